"""Signals that take a run away: training ends at the next step boundary, with a checkpoint, instead of anywhere.

SIGTERM is what clusters send before they take a machine back (30 seconds is the usual grace), SIGINT is Ctrl-C. With
several processes only some may get the signal: JAX's preemption service spreads the word, and all stop at one step.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[int], bool]]:
    """Makes SIGTERM and SIGINT wait within the block; yields `stop(step)`, to be asked once after every step.

    It is True at the step where all processes are to stop. A second Ctrl-C interrupts at once. Signals reach the main
    thread of Python only: in another one nothing is deferred.
    """
    several = jax.process_count() > 1
    requested = False

    def note(number: int, _: object) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service listens to this one

    def stop(step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step) if several else requested

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # with several processes SIGTERM is the preemption service's: a handler of ours would make it deaf
    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that is not Python's
