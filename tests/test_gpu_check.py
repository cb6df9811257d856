"""scripts/gpu_check: parts are resumed, cut and counted right; its programs run emulated."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench_can_be_imported() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


class Check:
    """The command over made-up tasks, which note in a file that they were run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runner: Any = importlib.import_module("gpu.runner")
        self.check: Any = importlib.import_module("gpu.check")
        self.parts: list[Any] = []

    def part(self, *tasks: tuple[str, str], limit_s: float = 60.0) -> None:
        """One more part; each task is a name and the code that it runs after noting its name."""
        number, noted = len(self.parts) + 1, self.folder / "ran"
        made = tuple(
            self.runner.Task(
                name,
                (sys.executable, "-c", f"open({str(noted)!r}, 'a').write('{name} ')\n{code}"),
                30.0,
            )
            for name, code in tasks
        )
        self.parts.append(self.runner.Part(number, f"p{number}", "made up", made, limit_s))

    def __call__(self, *args: str) -> int:
        out = ["--out", str(self.folder / "out"), "--results", str(self.folder / "results")]
        return int(self.check.main([*out, "--emulated", *args], self.parts))

    @property
    def ran(self) -> list[str]:
        noted = self.folder / "ran"
        return noted.read_text().split() if noted.exists() else []

    @property
    def found(self) -> dict[str, Any]:
        (file,) = (self.folder / "results").glob("emulated-*.json")
        parts: dict[str, Any] = json.loads(file.read_text())["parts"]
        return parts


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


ROW = """print('ROW {"n": %d}', flush=True)"""


def test_what_is_finished_is_not_run_again(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    check.part(("a", ROW % 1), ("b", ROW % 2))
    check.part(("c", ROW % 3))
    assert check("--part", "1") == 0
    assert check() == 0
    assert check.ran == ["a", "b", "c"]
    assert "part 1 p1: finished already" in capsys.readouterr().out
    assert check("--part", "2", "--again") == 0
    assert check.ran == ["a", "b", "c", "c"]
    assert check.found["p1"]["b"]["rows"] == [{"n": 2}]
    assert check("--list") == 0
    assert "2 of 2 done" in capsys.readouterr().out


def test_a_failure_stops_neither_the_next_task_nor_the_next_part(check: Check) -> None:
    why = f"on purpose in {check.folder / 'out' / 'there'}"
    check.part(("bad", f"{ROW % 1}\nraise ValueError({why!r})"), ("good", ROW % 2))
    check.part(("next", ROW % 3))
    assert check() == 1
    assert check.ran == ["bad", "good", "next"]
    bad = check.found["p1"]["bad"]
    assert (bad["status"], bad["rows"]) == ("failed", [{"n": 1}])
    assert bad["why"] == "ValueError: on purpose in OUT/there"
    assert check.found["p2"]["next"]["status"] == "done"


def test_what_was_found_before_a_cut_is_kept_and_the_rest_resumed(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check.runner, "LEAST_S", 0.5)
    child = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '60'])\n"
    check.part(
        ("quick", ROW % 1), ("slow", f"{child}{ROW % 2}\ntime.sleep(60)"), ("after", ROW % 3),
        limit_s=2.5,
    )  # fmt: skip
    assert check() == 1
    slow = check.found["p1"]["slow"]
    assert (slow["status"], slow["rows"]) == ("cut", [{"n": 2}])
    assert "after" not in check.found["p1"]
    state = check.runner.State.of(check.folder / "out")
    state.put(check.parts[0], check.parts[0].tasks[1], slow | {"cuts": check.runner.CUTS})
    assert check() == 0, "what was cut too often is left alone"
    assert check.ran == ["quick", "slow", "after"]


def test_what_needs_cuda_is_shown_as_such(check: Check) -> None:
    parts: Any = importlib.import_module("gpu.parts")
    every = parts.Catalogue(check.folder, emulated=True).parts()
    told = {task.name: task.not_run for part in every for task in part.tasks}
    assert told["mechanism"] == "needs CUDA"
    assert not told["1.3b none 1x4096 plain"]
    assert [part.number for part in every] == list(range(1, len(every) + 1))
    assert max(part.limit_s for part in every) <= 540
    assert every[0].name == "parity"
    assert sum(task.limit_s for task in every[0].tasks) <= every[0].limit_s <= 240
    check.parts = [every[1].__class__(1, "p", "", (every[1].tasks[1],))]
    assert check() == 0
    assert check.found["p"]["mechanism"] == {
        "status": "not run", "why": "needs CUDA", "rows": [], "seconds": 0.0, "cuts": 0,
    }  # fmt: skip


def test_every_program_takes_the_arguments_that_it_is_given(check: Check) -> None:
    parts: Any = importlib.import_module("gpu.parts")
    catalogue = parts.Catalogue(check.folder, emulated=False, host_gb=137)
    for part in [*catalogue.parts(), catalogue.quick()]:
        for task in part.tasks:
            file = Path(task.command[1])
            assert file.exists()
            if file.name not in ("tests.py", "probe.py", "mechanism.py"):
                assert f'"{task.command[2]}"' in file.read_text() or task.command[2] in parts.PEERS


def test_the_cross_section_is_one_call_and_pairs_are_alike(check: Check) -> None:
    parts: Any = importlib.import_module("gpu.parts")
    quick = parts.Catalogue(check.folder, emulated=False, host_gb=137).quick()
    assert sum(task.limit_s for task in quick.tasks) <= quick.limit_s < 540
    trained = [t.command[2:] for t in quick.tasks if t.command[1].endswith("finetune.py")]
    capped = {c[0]: c[1:] for c in trained if "quarter" in c}
    assert capped["ours"] == capped["deepspeed"] == capped["fsdp2"]
    roomy = {c[0]: c[1:] for c in trained if "none" in c}
    assert roomy["ours"] == roomy["plain"]
    assert set(capped["ours"]) - set(roomy["ours"]) == {"quarter"}
    generated = [t.command[2:] for t in quick.tasks if t.command[1].endswith("generate.py")]
    assert [c[0] for c in generated] == ["ours", "accelerate"]
    assert generated[0][1:] == generated[1][1:]


def test_the_cross_section_is_run_when_asked_for_only(check: Check) -> None:
    check.part(("a", ROW % 1))
    (part,) = check.parts
    check.parts.append(check.runner.Part(0, "quick", "", (part.tasks[0],)))
    assert check() == 0
    assert check.ran == ["a"]
    assert check("--quick") == 0
    assert check.ran == ["a", "a"]


def test_names_of_logs_can_be_carried_away(check: Check) -> None:
    parts: Any = importlib.import_module("gpu.parts")
    catalogue = parts.Catalogue(check.folder, emulated=True)
    logs = [
        check.runner.log_of(check.folder, part, task).name
        for part in [*catalogue.parts(), catalogue.quick()] for task in part.tasks
    ]  # fmt: skip
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in logs)
    assert len(set(logs)) == len(logs)


def test_a_bundle_holds_what_is_worth_keeping(check: Check) -> None:
    check.part(("a b", "import sys; print('why', file=sys.stderr)"))
    out = check.folder / "out"
    (out / "reports").mkdir(parents=True)
    (out / "reports" / "x.trace.json").write_text("{}")
    (out / "tmp1").mkdir()
    (out / "tmp1" / "weights").write_text("left behind by a task that was cut")
    assert check("--bundle", str(check.folder / "all.tgz")) == 0
    with tarfile.open(check.folder / "all.tgz") as kept:
        names = {n for n in kept.getnames() if kept.getmember(n).isfile()}
        log = kept.extractfile("out/logs/p1-a-b.log")
        assert log is not None
        assert log.read() == b"why\n"
    (results,) = (check.folder / "results").iterdir()
    assert names == {"out/state.json", "out/logs/p1-a-b.log", "out/reports/x.trace.json",
                     f"results/{results.name}"}  # fmt: skip


def test_what_was_cut_gets_more_time(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = list[float]()

    def cut(task: Any, limit_s: float, *_: Any) -> dict[str, Any]:
        limits.append(limit_s)
        return {"status": "cut", "why": "", "rows": [], "seconds": limit_s}

    monkeypatch.setattr(check.runner, "run_task", cut)
    check.part(("a", ""), limit_s=540)
    assert (check(), check(), check()) == (1, 1, 0)
    assert limits == [30.0, 60.0]


ENDS = """
import os
import pytest

pytestmark = pytest.mark.gpu

def test_a(): pass
def test_b(): os._exit(3)
def test_c(): raise ValueError
@pytest.mark.parametrize("n", [1, 2])
def test_d(n): pass
def test_e(): pytest.skip()
"""


def test_a_test_that_ends_the_process_does_not_take_the_others_along(check: Check) -> None:
    file = check.folder / "test_ends.py"
    file.write_text(ENDS)
    catalogue = importlib.import_module("gpu.parts").Catalogue(check.folder / "out", emulated=False)
    check.parts = [check.runner.Part(1, "p", "", (catalogue.task("t", "tests.py", str(file)),))]
    assert check() == 1
    found = check.found["p"]["t"]
    outcomes = {r["test"].rpartition("::")[2]: r["outcome"] for r in found["rows"] if "test" in r}
    assert outcomes == {
        "test_a": "passed", "test_b": "ended the process", "test_c": "failed",
        "test_d[1]": "passed", "test_d[2]": "passed", "test_e": "skipped",
    }  # fmt: skip
    assert found["rows"][-1]["tests"] == {
        "passed": 3, "ended the process": 1, "failed": 1, "skipped": 1,
    }  # fmt: skip
    assert found["why"].startswith("TestError: 3 passed")


def test_a_training_part_runs_emulated(tmp_path: Path) -> None:
    """The whole command, as on a GPU but for shapes and device: rows, reports, results."""
    out, results = tmp_path / "out", tmp_path / "results"
    script = BENCH.parent / "scripts" / "gpu_check"
    done = subprocess.run(
        [sys.executable, str(script), "--emulated", "--part", "11", "--out", str(out),
         "--results", str(results)], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = results.glob("emulated-*.json")
    (task,) = json.loads(file.read_text())["parts"]["disk"].values()
    row = next(row for row in task["rows"] if "tokens_per_s" in row)
    assert row["tflops"] == pytest.approx(
        6 * row["parameters"] * row["tokens"] / row["step_s"] / 1e12
    )
    assert row["stats"]["device"]["uploaded_bytes"] > 0
    assert row["stats"]["device"]["downloaded_bytes"] > 0
    assert row["stats"]["tiers"]["device"]["peak_bytes"] <= 4 << 20
    assert len(list((out / "reports").glob("*.json"))) == 2
