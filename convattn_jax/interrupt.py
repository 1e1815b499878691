"""Signals that take a run away: training ends at the next step boundary, with a checkpoint, instead of anywhere.

SIGTERM is what clusters send before they take a machine back (30 seconds is the usual grace), SIGINT is Ctrl-C. With
several processes only some may get the signal: JAX's preemption service spreads the word, and all stop at one step.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from convattn_jax.config import BY_KEYBOARD

_asked = itertools.count()  # how often, in all: the service wants a number that grows


class Stop:
    """What has been asked for by signals so far, and the exit status that goes with it."""

    def __init__(self):
        self._several = jax.process_count() > 1
        self._requested = False
        self.status = 0  # for `Interrupted`

    def __call__(self, step: int) -> bool:
        """Whether to stop, to be asked once after every step: True at the step where all processes are to."""
        if not self._several:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(next(_asked))  # of tasks in turn each counts from 1

    def note(self, number: int, _: object) -> None:
        """Handles a signal."""
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
        self.status = BY_KEYBOARD if number == signal.SIGINT else self.status
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service listens to this one


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
    """Makes SIGTERM and SIGINT wait within the block.

    A second Ctrl-C interrupts at once. Signals reach Python's main thread only: in another one nothing is deferred.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # with several processes SIGTERM is the preemption service's: a handler of ours would make it deaf
    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop.note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that is not Python's
