"""The first sines of a process have the bits of all later ones (promise P1)."""

from __future__ import annotations

import subprocess
import sys

# Each child is a process in which nobody has computed anything; its threads are awake when both
# come to MKL's first vector function. Without `settle` 6 to 15 of 1000 children differed.
CHILDREN = 500
RACE = f"""
import os, torch
{{imports}}
differ = 0
for _ in range({CHILDREN}):
    child = os.fork()
    if not child:
        torch.set_num_threads(2)
        turns = (torch.ones(32, 1) @ torch.arange(256.0)[None]).t() / torch.arange(1.0, 33.0)
        turns = torch.cat((turns, turns), -1)
        awake = torch.ones(1 << 20)
        for _ in range(3):
            awake.add_(1)
        os._exit(not torch.equal(torch.cos(turns), torch.cos(turns)))
    differ += os.waitpid(child, 0)[1] != 0
print(differ)
"""


def differing(imports: str) -> int:
    """In how many children the first cosines were not those of the second call."""
    code = RACE.format(imports=imports)
    command = [sys.executable, "-W", "ignore", "-c", code]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_offload_makes_it_ready_before_two_threads_use_it() -> None:
    assert differing("from offload import wrap") == 0
