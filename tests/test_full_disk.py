"""A disk without room: known as what it is, told once, and nothing else left unsaid."""

import logging
import struct
import sys
import types

import pytest
from etils import epath
from test_checkpoint import disk_full_after

from convattn_jax import events, full_disk

TENSORSTORE = (
    "RESOURCE_EXHAUSTED: Error writing \"a\": Failed to write 9 bytes: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(122, "Disk quota exceeded"), "Disk quota exceeded"),
        (ValueError(TENSORSTORE), "No space left on device"),
        (OSError(5, "Input/output error"), None),
        (ValueError("RESOURCE_EXHAUSTED: out of memory"), None),
        (RuntimeError("No space left on device"), None),
        (None, None),
    ],
)
def test_a_disk_without_room_is_known_by_its_errors(error, reason):
    assert full_disk.reason(error) == reason


@pytest.fixture
def told_once(monkeypatch):
    """`tell_once`, and what still reaches the hook that was there before."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: reported.append(found.exc_value))
    full_disk.tell_once()
    full_disk.tell_once()
    return reported


@pytest.mark.parametrize("name", ["absl", "asyncio"])
def test_only_what_is_of_a_full_disk_is_not_logged(told_once, caplog, name):
    for error in (ValueError(TENSORSTORE), OSError(5, "Input/output error"), None):
        logging.getLogger(name).error("a save failed", exc_info=error)
    assert [record.exc_info and str(record.exc_info[1]) for record in caplog.records] == [
        "[Errno 5] Input/output error",
        None,
    ]


def test_only_a_closed_loop_that_no_python_called_is_not_reported(told_once):
    def raised(name, error):
        def fail():
            raise error

        fail.__code__ = fail.__code__.replace(co_name=name)
        try:
            fail()
        except Exception as caught:
            trace = caught.__traceback__.tb_next
            return types.SimpleNamespace(exc_type=type(error), exc_value=error, exc_traceback=trace)

    closed = "Event loop is closed"
    kept = [raised("call_soon_threadsafe", RuntimeError("other")), raised("run", RuntimeError(closed))]
    for found in (raised("call_soon_threadsafe", RuntimeError(closed)), *kept):
        sys.unraisablehook(found)
    assert told_once == [found.exc_value for found in kept]


def records(path):
    """The events of a file, as bytes."""
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        found.append(content[12 : 12 + size])
        content = content[16 + size :]
    return found


def test_events_hold_each_figure_and_where_they_begin(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with events.recorder(epath.Path(tmp_path / "events"), 3, True) as write:
        write({"step": 3, "loss": 2.5, "eval_loss": 3.5})
        write({"step": 4, "loss": 2.25})
    [file] = (tmp_path / "events").iterdir()
    found = [Event.FromString(record) for record in records(file)]
    assert [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in found if e.summary.value] == [
        (3, "loss", 2.5),
        (3, "eval_loss", 3.5),
        (4, "loss", 2.25),
    ]
    assert (3, SessionLog.START) in [(event.step, event.session_log.status) for event in found]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the file that could not be closed
def test_events_without_room_are_an_error_and_no_run_that_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "INTERVAL", -1.0)

    def fill():
        with events.recorder(epath.Path(tmp_path), 1, True) as write:
            for step in range(100):
                write({"step": step, "loss": 1.0})

    with disk_full_after(2000), pytest.raises(OSError, match="File too large"):
        fill()
