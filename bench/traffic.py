"""The least bytes a full fine-tuning step can move, from arithmetic alone: no planner, no trace.

Per step of a plain loop with Adam-like state (s tensors of the weights' size P, in bytes):

    reads   weights: forward, backward, update; gradients: update; state: update      (4 + s) P
    writes  gradients: backward; weights: update; state: update                       (2 + s) P

Memory of C bytes can save some of that. Every reuse of a byte spans one of three instants: the
turn from forward to backward (saves a read of a weight), from backward to update (a gradient
kept saves its write and its read: 2; a weight 1), from update to the next forward (a read; and
the write too if the weight stays until its next update, which then spans all three instants
and saves 4). State kept for the whole step spans all three too and saves 2. With prices 1, 2 and
1 per byte for the three instants no reuse saves more than it pays, so by linear programming
duality no schedule saves more than 4 C. With prices 0, 2 and 0 only weights save more than they
pay, by at most 2 a byte, so none saves more than 2 C + 2 P either:

    minimum = (6 + 2 s) P - 2 E - min(4 C, 2 C + 2 P)

where E are tables that forward and backward do not read as a whole (input embeddings).

If weights are updated during the backward pass, in the visit that made their gradient, gradients
live and die in memory and the update reads nothing that the visit has not read:

    reads   weights: forward, visit; state: visit      (2 + s) P
    writes  weights: visit; state: visit               (1 + s) P

Reuse spans one of two instants: the turn (a weight: 1) and the step's end (a weight: 1; kept over
both, the write too: 3; state kept over both: 2). With prices 1 and 1 only weights save more than
they pay, by 1 a byte of memory or of weights, whichever is less:

    minimum in backward = (3 + 2 s) P - E - 2 C - min(C, P)

Neither counts the memory that staging, activations and gradients take, so neither can be reached.
"""

from __future__ import annotations


def minimum_bytes(
    weight_bytes: int, state_copies: int, memory_bytes: int, embedding_bytes: int = 0
) -> int:
    """Least bytes read plus written per step for a budget of ``memory_bytes``; at least 0."""
    everything = (6 + 2 * state_copies) * weight_bytes
    saved = min(4 * memory_bytes, 2 * memory_bytes + 2 * weight_bytes)
    return max(everything - 2 * embedding_bytes - saved, 0)


def minimum_in_backward_bytes(
    weight_bytes: int, state_copies: int, memory_bytes: int, embedding_bytes: int = 0
) -> int:
    """The same for a loop that updates weights in the visit of the backward pass."""
    everything = (3 + 2 * state_copies) * weight_bytes
    saved = 2 * memory_bytes + min(memory_bytes, weight_bytes)
    return max(everything - embedding_bytes - saved, 0)
