"""What a person sees of a sweep: a table with a row a run on a terminal, a line an event anywhere else."""

import dataclasses
import sys
import time
from collections.abc import Sequence

import rich.console
import rich.live
import rich.table
from rich.text import Text

from convattn_jax.console import duration

INTERVAL = 1.0  # seconds between two frames
STYLES = {
    "done": "green",
    "running": "bold",
    "failed": "bold red",
    "waiting": "dim",
    "stopped": "yellow",
    "elsewhere": "yellow",
}


@dataclasses.dataclass
class Row:
    """Where a run stands; `where` says how far its stage is."""

    name: str
    state: str = "waiting"
    stage: str = ""
    where: str = ""
    loss: str = ""
    seconds: float = 0.0


class Board:
    """The rows, drawn again whenever `show` is called; a context manager, which leaves the last table standing."""

    def __init__(self, names: Sequence[str]):
        self.rows = {name: Row(name) for name in names}
        self._console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
        self._live = rich.live.Live(console=self._console, auto_refresh=False) if sys.stdout.isatty() else None
        self._drawn = 0.0

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table(list(self.rows.values())), refresh=True)
            self._live.stop()
        else:
            self._console.print(self._table(list(self.rows.values())))

    def show(self, name: str, **changes: str | float) -> None:
        """Changes a row; a new state or stage is a line where there is no terminal."""
        row = self.rows[name]
        event = any(getattr(row, key) != value for key, value in changes.items() if key in ("state", "stage"))
        for key, value in changes.items():
            setattr(row, key, value)
        if self._live is None:
            if event:
                parts = [row.name, row.state, row.stage, row.where, row.loss and f"held-out {row.loss}"]
                parts.append(duration(row.seconds) if row.state != "running" and row.seconds else "")
                self._console.print(Text("  ".join(filter(None, parts))), soft_wrap=True)
        elif event or time.monotonic() - self._drawn > INTERVAL:
            self._drawn = time.monotonic()
            self._live.update(self._table(self._in_view(row)), refresh=True)

    def _in_view(self, row: Row) -> list[Row]:
        """As many rows as the terminal has room for, the first that runs among them, or else the given one."""
        rows, room = list(self.rows.values()), max(3, self._console.height - 6)
        row = next((row for row in rows if row.state == "running"), row)
        first = min(max(0, rows.index(row) - room // 2), max(0, len(rows) - room))
        return rows[first : first + room]

    def _table(self, rows: Sequence[Row]) -> rich.table.Table:
        ended = sum(row.state == "done" for row in self.rows.values())
        table = rich.table.Table(
            header_style="bold", title=f"{ended} of {len(self.rows)} runs done", title_justify="left"
        )
        for name in ("run", "state", "stage", "where", "held-out loss", "time"):
            table.add_column(
                name, no_wrap=name == "run", justify="right" if name in ("held-out loss", "time") else "left"
            )
        for row in rows:
            cells = (row.name, row.state, row.stage, row.where, row.loss, duration(row.seconds) if row.seconds else "")
            table.add_row(*(Text(cell) for cell in cells), style=STYLES.get(row.state, ""))
        return table
