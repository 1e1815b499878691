"""A device that runs out of memory: what a step needs, and which setting makes it need less."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from convattn_jax.config import UserError
from convattn_jax.train import TrainConfig

ROOM = 0.95  # of a device's memory that a step may plan with: the rest is lost between allocations


class Need(NamedTuple):
    """Bytes on each device, as the compiler plans them."""

    held: int  # arguments and results: the state and a batch
    temporary: int  # what the step computes in between


@contextlib.contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Turns a device's running out of memory into a `UserError` with `advice()`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error).lower()
        if "resource_exhausted" not in text or "out of memory" not in text:
            raise
        raise UserError(advice()) from error


def need(lower: Callable[[], Any]) -> Need | None:
    """What a lowered step will need; None where the compiler can't say."""
    try:
        plan = lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError:
        return None
    if plan is None:
        return None
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Need(held, plan.temp_size_in_bytes)


def capacity() -> int | None:
    """Bytes that this process may use of its first device; None where it doesn't say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def training_advice(config: TrainConfig, remat: bool, shards: int, needed: Need | None, limit: int | None) -> str:
    """One line: what the step needs, and the least `train.accumulate` with which it should fit.

    `shards` is how many ways a batch is divided over the devices.
    """
    size, now = config.batch_size, config.accumulate
    words = [f"train.batch_size={size}: out of memory on {jax.devices()[0].device_kind}"]
    least = now + 1
    if needed is not None:
        total = needed.held + needed.temporary
        there = f" of {_gib(limit)}" if limit else ""
        words.append(f"a step needs about {_gib(total)}{there}, {_gib(needed.held)} of it for the model's state")
        if limit and ROOM * limit > needed.held:
            least = max(least, math.ceil(now * needed.temporary / (ROOM * limit - needed.held)))
    possible = [n for n in range(least, size + 1) if size % n == 0 and size // n % shards == 0]
    remedies = [f"set train.accumulate={possible[0]} (now {now})"] if possible else []
    remedies += ["lower train.batch_size"] + ([] if remat else ["set model.remat=True"])
    return "; ".join(words) + ": " + ", or ".join(remedies)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
