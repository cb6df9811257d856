"""MKL's vector mathematics, made ready by one thread before two use it at once.

torch computes exp, sin, cos and their like on x86 by MKL, on all its threads. MKL makes itself
ready in the first such call of a process; where two threads come first together, and a matrix
product came before, one of them is now and then (in 1 to 2% of processes on two cores) given
another routine for that call: half of its results differ in the last bit. In a Llama that call
makes the rotary table, so all later bits differ from those of another run of the same program.
That is so without offload, too (torch 2.13; see tests/test_vectormath.py).
"""

from __future__ import annotations

import torch


def settle() -> None:
    """Have MKL make itself ready: a call so small that one thread makes it."""
    torch.exp(torch.ones(16))
