"""The least bytes a full fine-tuning step can move, from arithmetic alone: no planner, no trace.

Per step of a plain loop with Adam-like state (s tensors of the weights' size P, in bytes):

    reads   weights: forward, backward, update; gradients: update; state: update      (4 + s) P
    writes  gradients: backward; weights: update; state: update                       (2 + s) P

Memory of C bytes can save some of that. Every reuse of a byte spans one of three instants: the
turn from forward to backward (saves a read of a weight), from backward to update (a gradient
kept saves its write and its read: 2; a weight 1), from update to the next forward (a read; and
the write too if the weight stays until its next update, which then spans all three instants
and saves 4). With prices 1, 2 and 1 per byte for the three instants no reuse saves more than it
pays, so by linear programming duality no schedule saves more than 4 C:

    minimum = (6 + 2 s) P - 2 E - 4 C

where E are tables that forward and backward do not read as a whole (input embeddings).
"""

from __future__ import annotations


def minimum_bytes(
    weight_bytes: int, state_copies: int, memory_bytes: int, embedding_bytes: int = 0
) -> int:
    """Least bytes read plus written per step for a budget of ``memory_bytes``; at least 0."""
    everything = (6 + 2 * state_copies) * weight_bytes
    return max(everything - 2 * embedding_bytes - 4 * memory_bytes, 0)
