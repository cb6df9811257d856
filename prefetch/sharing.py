"""How fast the compute lane and the drive go while both run, where they share cores and DRAM."""

from __future__ import annotations

from typing import NamedTuple

LEAST_PACE = 0.01  # nothing stands still


class Sharing(NamedTuple):
    """Pace of each while both run, as a part of its lone rate.

    1 where nothing is shared, and where compute times were recorded beside transfers.
    """

    compute: float = 1.0
    drive: float = 1.0

    @staticmethod
    def of(drag: float, disk_drag: float) -> Sharing:
        """From what each lone second of one side takes from the other (``spec.Compute``).

        With C and R lone seconds done in T together, T = C + drag R = R + disk_drag C; the paces
        are C / T and R / T.
        """
        rest = max(1.0 - drag * disk_drag, LEAST_PACE)
        paces = (1.0 - drag) / rest, (1.0 - disk_drag) / rest
        return Sharing(*(min(max(pace, LEAST_PACE), 1.0) for pace in paces))


ALONE = Sharing()
