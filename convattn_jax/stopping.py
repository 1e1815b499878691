"""SIGTERM, which a cluster sends before it takes a machine back, and Ctrl-C, until the training loop defers them."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from convattn_jax.config import BY_KEYBOARD, Interrupted

BY_CTRL_C = "interrupted: the same command resumes from the last checkpoint"
BY_CLUSTER = "stopped by SIGTERM: the same command goes on from here"
SOON = 0.01  # seconds


class Listener:
    """Ends the process while modules are `loading`; from then on a signal is an exception, wherever it finds Python."""

    def __init__(self, loading: bool):
        self.loading = loading
        self._error: BaseException = KeyboardInterrupt()
        self._hook = sys.unraisablehook

    def handle(self, number: int, _: object) -> None:
        """Handles a signal."""
        by_keyboard = number == signal.SIGINT
        if self.loading:  # nothing is there to lose, and an exception within an extension's start can crash Python
            os.write(2, f"{BY_CTRL_C if by_keyboard else BY_CLUSTER}\n".encode())
            os._exit(BY_KEYBOARD if by_keyboard else 0)
        raise KeyboardInterrupt if by_keyboard else Interrupted(BY_CLUSTER)

    def lost(self, unraisable: Any) -> None:
        """Python drops what is raised in callbacks (JAX has one for garbage): raise it again when that has ended."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._error = unraisable.exc_value
            signal.setitimer(signal.ITIMER_REAL, SOON)
        else:
            self._hook(unraisable)

    def again(self, *_: object) -> None:
        """Handles the timer."""
        raise self._error


@contextlib.contextmanager
def listening(loading: bool) -> Iterator[Listener]:
    """Has signals end the block with `Interrupted` (SIGTERM) or KeyboardInterrupt; in the main thread only."""
    listener = Listener(loading)
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    handlers = {signal.SIGTERM: listener.handle, signal.SIGINT: listener.handle, signal.SIGALRM: listener.again}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    hook, sys.unraisablehook = sys.unraisablehook, listener.lost
    try:
        yield listener
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
