"""What a person sees while it runs: one live line on a terminal or in a notebook, plain log lines anywhere else."""

import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

LOG_INTERVAL = 10.0  # seconds between log lines
FRAME_INTERVAL = 0.25  # seconds between frames of the live line


class Console:
    """Messages, progress and the final table; use it as a context manager, which leaves the terminal clean.

    The live line is drawn from the calls themselves, without a background thread: the data workers may fork.
    A quiet console takes every call and shows nothing (hosts other than the first, tests, library calls).
    """

    def __init__(
        self, quiet: bool = False, file: io.TextIOBase | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        out: Any = file or sys.stdout
        self._clock = clock
        self._live = not quiet and _can_redraw(out)
        if self._live:
            # In a notebook rich finds its own way to the output cell and wants no file.
            self._out = rich.console.Console(
                file=None if out is sys.stdout else out, force_terminal=True if out.isatty() else None
            )
        else:
            self._out = rich.console.Console(
                file=out, quiet=quiet, force_terminal=False, force_jupyter=False, color_system=None
            )
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._what: str | None = None  # the activity that is under way
        self._since = self._shown = 0.0
        self._eval_loss: float | None = None
        self._paced: tuple[int, float] | None = None  # the first training report: its step and time

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def message(self, text: str) -> None:
        """Prints one line, above the live line if there is one."""
        self._print(Text(text))

    def report(self, what: str, done: int, total: int) -> None:
        """The progress callback of data preparation: `done` of `total` (0: unknown); `done >= total > 0` ends it."""
        started = self._begin(what)
        ended = done >= total > 0
        amount = f"{human(done)} / {human(total)}" if total else human(done) if done else ""
        elapsed = self._clock() - self._since
        if self._live:
            self._draw(what, amount, done, total, force=started or ended)
        elif ended:
            self.message(f"{what}: done, {human(total)} in {duration(elapsed)}")
        elif started or self._due(LOG_INTERVAL):
            self._shown = self._clock()
            self.message(f"{what}: {amount}" if amount else what)
        if ended:
            self._finish()

    def training(
        self,
        step: int,
        steps: int,
        loss: float,
        eval_loss: float | None,
        tokens_per_second: float | int,
        seconds_left: float | int,
    ) -> None:
        """Shows where training stands; `eval_loss` is the held-out loss if this step measured it, else None."""
        started = self._begin("step")
        ended = step >= steps
        if eval_loss is not None:
            self._eval_loss = eval_loss
        shown_eval = self._eval_loss if self._live else eval_loss
        parts = [
            f"loss {loss:.3f}",
            *([f"held-out {shown_eval:.3f}"] if shown_eval is not None else []),
            *([f"{human(tokens_per_second)} tokens/s"] if 0 < tokens_per_second < math.inf else []),
            *([f"{duration(seconds_left)} left"] if math.isfinite(seconds_left) and not ended else []),
        ]
        where = f"step {step:,}/{steps:,}"
        if self._live:
            self._draw(where, "  ".join(parts), step, steps, force=started or ended or eval_loss is not None)
        elif started or ended or eval_loss is not None or self._due(LOG_INTERVAL):
            self._shown = self._clock()
            self.message("  ".join([where, *parts]))
        if ended:
            self._finish()

    def seconds_left(self, step: int, steps: int) -> float:
        """What training still takes at the pace since its first report, which compilation precedes; NaN at that one."""
        now = self._clock()
        if self._paced is None or self._paced[0] >= step:
            self._paced = (step, now)
            return math.nan
        first, began = self._paced
        return (now - began) / (step - first) * (steps - step)

    def table(self, title: str, rows: Iterable[tuple[str, object]]) -> None:
        """Prints labels and values in two aligned columns; values, such as paths, are never cut or wrapped."""
        self._finish()
        rows = list(rows)
        width = max((len(label) for label, _ in rows), default=0)
        self._print(Text(f"\n{title}", style="bold"))
        for label, value in rows:
            self._print(Text.assemble("  ", (f"{label:<{width}}", "dim"), f"  {value}"))

    def _print(self, text: Text) -> None:
        self._out.print(text, soft_wrap=True)
        self._out.file.flush()

    def _begin(self, what: str) -> bool:
        """Makes `what` the activity that is under way; True if it was not."""
        if self._what == what:
            return False
        self._finish()
        self._what, self._since, self._shown = what, self._clock(), -math.inf
        return True

    def _due(self, interval: float) -> bool:
        return self._clock() - self._shown >= interval

    def _draw(self, left: str, right: str, done: int, total: int, force: bool) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.fields[left]}", style="bold", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[right]}", markup=False),
                console=self._out,
                auto_refresh=False,
                expand=True,
            )
            self._task = self._progress.add_task("", total=total or None, left=left, right=right)
            self._progress.start()
        if force or self._due(FRAME_INTERVAL):
            self._shown = self._clock()
            self._progress.update(self._task, completed=done, total=total or None, left=left, right=right, refresh=True)

    def _finish(self) -> None:
        """Ends the live line, which stays as the record of what was reached, and gives the cursor back."""
        progress, self._progress, self._what = self._progress, None, None
        if progress is not None:
            progress.stop()


def human(number: float | int, gap: str = "") -> str:
    """At most three digits and a unit prefix, with `gap` between them: 950, 61.2k, 1.23M."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            digits = 0 if not prefix or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
            return f"{number:.{digits}f}{gap}{prefix}"
        number /= 1000
    return f"{number:,.1f}{gap}T"


def duration(seconds: float | int) -> str:
    """A length of time in its two largest units: 4.2 s, 45 s, 4 min 10 s, 2 h 05 min, 3 d 04 h."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size:02d} {smaller}"
    return f"{whole} s"


def _can_redraw(file: Any) -> bool:
    """Whether a line on `file` can be drawn over: a terminal, or a notebook whose widgets are there."""
    if file is sys.stdout and rich.console.Console().is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return file.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
