"""Nobody waits for ever for a process that is gone or stuck: all leave with a non-zero status and say where they stood.

JAX's runtime ends the others when a process has sent no heartbeat for `watchdog.killed_seconds`. A process whose heart
beats but that gets on no more (a hung file system, a device that doesn't answer) is ended here, by a timer of the
interpreter (`faulthandler`) that needs neither the main thread nor its lock.
"""

import contextlib
import dataclasses
import faulthandler
import math
import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import jax

from convattn_jax import distributed
from convattn_jax.config import check

COMPILING = 10  # times as long may pass where a program is compiled first
LEAVING = 30  # seconds that a process that has failed waits for the others to leave in good order


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """How long to wait for another process; `configs/base.py` documents each key."""

    killed_seconds: int
    frozen_seconds: int

    def __post_init__(self):
        for name, seconds in dataclasses.asdict(self).items():
            check(seconds >= 1, f"watchdog.{name}={seconds} must be at least 1")


@runtime_checkable
class Alive(Protocol):
    """A sign of life."""

    def __call__(self, compiling: bool = False) -> None:
        """Says that the process gets on; with `compiling`, that the next sign may take `COMPILING` times as long."""
        ...


@contextlib.contextmanager
def watched(frozen_seconds: int) -> Iterator[Alive]:
    """Within the block a run of several processes must call what it yields at least every `frozen_seconds`.

    If it doesn't, the stacks of all threads go to stderr and the process ends with status 1; so it does some time
    after an exception, for at the end of a process JAX waits for the others, who may wait for it. A single process
    is let alone: nobody waits for it, and a person may have stopped it with Ctrl-Z.

    Raises:
      AloneError: a collective has failed, as they do when another process is gone.
    """
    if jax.process_count() == 1:
        yield lambda compiling=False: None
        return
    faulthandler.enable()  # the runtime ends a process by an abort: then too it says where it stood
    armed = -math.inf

    def alive(compiling: bool = False) -> None:
        nonlocal armed
        now = time.monotonic()
        if compiling:
            faulthandler.dump_traceback_later(COMPILING * frozen_seconds, exit=True)
            armed = -math.inf  # whatever comes next shortens it
        elif now - armed > frozen_seconds / 100:  # a timer is a thread: not one for each step
            faulthandler.dump_traceback_later(frozen_seconds, exit=True)
            armed = now

    alive(compiling=True)
    try:
        yield alive
    except BaseException as error:
        faulthandler.dump_traceback_later(LEAVING, exit=True)
        if isinstance(error, jax.errors.JaxRuntimeError) and (alone := distributed.alone(error)):
            raise alone from error
        raise
    faulthandler.cancel_dump_traceback_later()
