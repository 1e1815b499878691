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
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.summary import scalar

    proto: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    folder.mkdir(parents=True, exist_ok=True)
    file, flushed = EventsWriter(str(folder / "events")), time.monotonic()

    def add(step: int, **content: Any) -> None:
        file.write_event(proto.Event(step=step, wall_time=time.time(), **content))

    def write(row: Mapping[str, float | int]) -> None:
        nonlocal flushed
        for name, value in row.items():
            if name != "step":
                add(int(row["step"]), summary=scalar(name, value))
        if time.monotonic() - flushed > INTERVAL:
            flushed = time.monotonic()
            file.flush()

    add(first_step, file_version="brain.Event:2")
    add(first_step, session_log=proto.SessionLog(status=proto.SessionLog.START))
    try:
        yield write
    finally:
        file.close()
