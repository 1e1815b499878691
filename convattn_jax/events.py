"""TensorBoard events beside metrics.jsonl, when the extra `tensorboard` is installed."""

import contextlib
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from convattn_jax.data import bucket

INTERVAL = 30.0  # seconds between two flushes, which wait for the disk


@contextlib.contextmanager
def recorder(folder: epath.Path, first_step: int, wanted: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A function that writes one row of metrics, if wanted; none in a bucket, where files can't grow.

    Rows from `first_step` on replace an interrupted run's.

    Raises:
      OSError: there is no room. (A `SummaryWriter`'s thread would die of it, and the run wait for that thread.)
    """
    if not wanted or bucket.in_a_bucket(folder) or importlib.util.find_spec("tensorboardX") is None:
        yield lambda row: None
        return
    file: _File | None = None

    def write(row: Mapping[str, float | int]) -> None:
        nonlocal file
        if file is None:
            file = _File(folder, first_step)
        file.add(row)

    try:
        yield write
    finally:
        if file is not None:
            file.close()


class _File:
    """A file of events that begins at a step; made with the first row, for tensorboardX would delay every start."""

    def __init__(self, folder: epath.Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.summary import scalar

        self._proto: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._scalar = scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._flushed = EventsWriter(str(folder / "events")), time.monotonic()
        self._event(first_step, file_version="brain.Event:2")
        self._event(first_step, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))

    def _event(self, step: int, **content: Any) -> None:
        self._file.write_event(self._proto.Event(step=step, wall_time=time.time(), **content))

    def add(self, row: Mapping[str, float | int]) -> None:
        """Writes a row, an event a figure."""
        for name, value in row.items():
            if name != "step":
                self._event(int(row["step"]), summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > INTERVAL:
            self._flushed = time.monotonic()
            self._file.flush()

    def close(self) -> None:
        """Writes what waits to be written."""
        self._file.close()
