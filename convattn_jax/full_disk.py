"""A disk without room is told in one line: what libraries print of it beside the error that they raise is left out."""

import errno
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason(error: BaseException | None) -> str | None:
    """What the system says of a disk without room, if this is one: an `OSError`, or TensorStore's `ValueError`."""
    for code in CODES:
        of_system = isinstance(error, OSError) and error.errno == code
        of_tensorstore = isinstance(error, ValueError) and os.strerror(code) in str(error)
        if of_system or of_tensorstore:
            return os.strerror(code)
    return None


def tell_once() -> None:
    """Leaves out what Orbax and asyncio write to stderr of each array that found no room: `Checkpoints` raises it."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    warnings.filterwarnings("ignore", r"coroutine 'async_serialize_from_host\b.*was never awaited", RuntimeWarning)
    if getattr(sys.unraisablehook, "func", None) is not _report:
        sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and reason(record.exc_info[1]))


def _report(before: Callable[["sys.UnraisableHookArgs"], object], found: "sys.UnraisableHookArgs") -> None:
    """Reports an error, unless it is what a thread of TensorStore meets after the first array has failed.

    Orbax then closes the event loop, and each write that ends later finds it closed, in a call that no Python made.
    """
    trace = found.exc_traceback
    late = trace is not None and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"
    if not (late and isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
        before(found)
