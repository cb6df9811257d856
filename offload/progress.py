"""What a run shows while it works: a live panel on a terminal, plain lines elsewhere, or JSON."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol

from offload.remaining import Left, StepsLeft
from offload.tiers.spec import format_size

if TYPE_CHECKING:
    from offload.metrics import StepReport


@dataclass(frozen=True, slots=True)
class View:
    """How far a run is, in the three forms in which that is shown.

    ``title`` stands before the bar, ``rows`` below it; ``line`` is the whole as one plain line,
    ``values`` the same for programs.
    """

    title: str
    done: int
    total: int
    left: Left
    rows: tuple[tuple[str, ...], ...]
    line: str
    values: dict[str, Any]


class Observer(Protocol):
    """Who is told about a run. Every call comes from the training thread."""

    def begin(self, first_step: int, last_step: int) -> None: ...

    def step(self, report: StepReport) -> None: ...

    def show(self, view: View) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def event(self, name: str, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def bound_text(report: StepReport) -> str:
    """``1.20 s/step (1.08 x bound)``, or without the bound while it is not known."""
    if not report.bound_s:
        return f"{report.step_s:.2f} s/step"
    return f"{report.step_s:.2f} s/step ({report.step_s / report.bound_s:.2f} x bound)"


def tiers_text(report: StepReport) -> str:
    """``host 96.0 MiB, disk 354.0 MiB``."""
    held = (f"{tier} {format_size(size)}" for tier, size in report.tier_bytes.items() if size)
    return ", ".join(held)


def warn(text: str) -> None:
    """A warning, which is never left out, whatever else is."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def step_line(report: StepReport, last_step: int, left: Left, *, verbose: bool = False) -> str:
    """One step as one plain line."""
    parts = [
        f"step {report.step:>{len(str(last_step))}}/{last_step}",
        f"loss {report.loss:.4f}",
        f"lr {report.lr:.2e}",
        f"{report.tokens_per_s:,.0f} tok/s",
        bound_text(report),
        tiers_text(report),
        f"left {left}",
    ]
    if verbose and report.grad_norm is not None:
        parts.insert(-1, f"norm {report.grad_norm:.3f}")
    if report.eval_loss is not None:
        parts.insert(2, f"eval loss {report.eval_loss:.4f}")
    return "  ".join(part for part in parts if part)


class PlainProgress:
    """One line a step, flushed, for logs and pipes."""

    def __init__(self, stream: IO[str] | None = None, *, verbose: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._verbose = verbose
        self._left = StepsLeft(0)

    def begin(self, first_step: int, last_step: int) -> None:
        self._left = StepsLeft(last_step)

    def step(self, report: StepReport) -> None:
        left = left_after(self._left, report)
        self.note(step_line(report, self._left.last_step, left, verbose=self._verbose))

    def show(self, view: View) -> None:
        self.note(view.line)

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        warn(text)

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Nothing: events are for programs."""

    def close(self) -> None:
        """Nothing is held."""


class QuietProgress(PlainProgress):
    """Only warnings."""

    def note(self, text: str) -> None:
        """Nothing is said."""


class JsonProgress:
    """One JSON object a line: ``{"event": "step", ...}``; notes go to stderr, or nowhere."""

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._left = StepsLeft(0)

    def begin(self, first_step: int, last_step: int) -> None:
        self._left = StepsLeft(last_step)
        self.event("begin", {"first_step": first_step, "last_step": last_step})

    def step(self, report: StepReport) -> None:
        left_s = left_after(self._left, report).seconds
        self.event("step", report.to_dict() | {"left_s": round(left_s, 1)})

    def show(self, view: View) -> None:
        self.event("step", view.values)

    def note(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        warn(text)

    def event(self, name: str, values: dict[str, Any]) -> None:
        print(json.dumps({"event": name} | values), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class LiveProgress:
    """A panel that redraws in place: bar, loss, rate, step against its bound, tiers, time left."""

    def __init__(self, *, verbose: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False)
        self._verbose = verbose
        self._left = StepsLeft(0)
        self._eval_loss: float | None = None

    def begin(self, first_step: int, last_step: int) -> None:
        self._left = StepsLeft(last_step)
        self._live.start()

    def step(self, report: StepReport) -> None:
        if report.eval_loss is not None:
            self._eval_loss = report.eval_loss
        left, last_step = left_after(self._left, report), self._left.last_step
        self._draw(f"step {report.step}/{last_step}", report.step, last_step, left,
                   self._rows(report))  # fmt: skip

    def show(self, view: View) -> None:
        self._draw(view.title, view.done, view.total, view.left, view.rows)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Nothing: events are for programs."""

    def close(self) -> None:
        self._live.stop()

    def _rows(self, report: StepReport) -> tuple[tuple[str, ...], ...]:
        loss = f"{report.loss:.4f}"
        if self._eval_loss is not None:
            loss += f"  (held out {self._eval_loss:.4f})"
        holds = (("holds", tiers_text(report)),) if report.tier_bytes else ()
        norm: tuple[tuple[str, ...], ...] = ()
        if self._verbose and report.grad_norm is not None:
            norm = (("norm", f"{report.grad_norm:.3f}"),)
        return (
            ("loss", loss, f"lr {report.lr:.2e}"),
            ("speed", f"{report.tokens_per_s:,.0f} tokens/s", bound_text(report)),
            *holds,
            *norm,
        )

    def _draw(
        self, title: str, done: int, total: int, left: Left, rows: tuple[tuple[str, ...], ...]
    ) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        panel = Table.grid(padding=(0, 2))
        panel.add_row(title, ProgressBar(total=total, completed=done, width=40), f"left {left}")
        for row in rows:
            panel.add_row(*row)
        self._live.update(panel, refresh=True)


def left_after(left: StepsLeft, report: StepReport) -> Left:
    """The time that is left, now that a step has been reported."""
    return left.after(report.step, report.step_s, time.perf_counter(), steady=report.steady)


def choose_observer(*, as_json: bool, verbose: bool = False, quiet: bool = False) -> Observer:
    """JSON if asked for; nothing if quiet; a live panel if stdout is a terminal; else lines."""
    if as_json:
        return JsonProgress(quiet=quiet)
    if quiet:
        return QuietProgress()
    if sys.stdout.isatty():
        return LiveProgress(verbose=verbose)
    return PlainProgress(verbose=verbose)
