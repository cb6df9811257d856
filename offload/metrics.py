"""What one optimizer step reports, and the file that keeps every report."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. ``tokens`` counts all micro-batches; ``tier_bytes`` is bytes held.

    ``steady``: it followed a plan, as those after it will; the first ones are recorded.
    """

    step: int
    loss: float
    lr: float
    tokens: int
    step_s: float
    bound_s: float | None = None
    grad_norm: float | None = None
    eval_loss: float | None = None
    tier_bytes: dict[str, int] = field(default_factory=dict)
    steady: bool = True

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s if self.step_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not known is left out."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return known | {"tokens_per_s": round(self.tokens_per_s, 1)}


class MetricsLog:
    """A JSON-lines file, one line a step, without gaps or repeats over any number of resumes."""

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        """Open ``path`` to go on after ``after_step``; later lines, of lost steps, are dropped."""
        kept = _lines_until(path, after_step)
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)
        self._file: TextIOWrapper = path.open("a", encoding="utf-8")

    def write(self, report: StepReport) -> None:
        """Append one line; it is in the file when this returns."""
        self._file.write(json.dumps(report.to_dict()) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _lines_until(path: Path, last_step: int) -> list[str]:
    if not path.exists():
        return []
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the torn last line of a run that was killed
        if step <= last_step:
            kept.append(line + "\n")
    return kept
