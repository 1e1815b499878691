"""Which form of attention, of a convolution, of a sublayer's end serves a call: the first with no reason against it."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

from convattn_jax.config import UserError
from convattn_jax.kernels.inputs import supports

log = logging.getLogger(__name__)

MAX_RADIUS = 64  # each query carries 2n numbers through the kernel: wide kernels gain nothing from it


class Call(NamedTuple):
    """What the choice depends on."""

    platform: str  # "gpu", "tpu", "cpu", or an old TPU, as "tpu v4"
    length: int
    keys: int
    head_size: int
    dtype: str
    dense: bool  # a bias of T x S is part of the score
    radius: int  # of the widest taps


PLATFORMS = {"pallas_gpu": ("gpu", "cuda"), "pallas_tpu": ("tpu",)}
MACHINES = {"pallas_gpu": "NVIDIA GPUs", "pallas_tpu": "TPUs from v5 on"}  # older ones have no strided roll
OLD_TPUS = ("TPU v2", "TPU v3", "TPU v4")


def _fused(name: str, call: Call) -> str | None:
    """Why a fused kernel can't serve a call."""
    if call.platform not in PLATFORMS[name]:
        return f"it runs on {MACHINES[name]}, not on {call.platform}"
    if call.dense:
        return "the score holds a bias that isn't made of taps"
    if call.radius > MAX_RADIUS:
        return f"taps reach {call.radius} positions, more than {MAX_RADIUS}"
    return supports(call.length, call.keys, call.head_size, call.dtype)


# name -> the reason why it can't serve a call, None when it can; the first that can does
IMPLEMENTATIONS: dict[str, Callable[[Call], str | None]] = {
    "pallas_gpu": functools.partial(_fused, "pallas_gpu"),
    "pallas_tpu": functools.partial(_fused, "pallas_tpu"),
    "plain": lambda call: None,
}


def implementation(call: Call, forced: str = "auto") -> str:
    """The name of the implementation that serves a call; says once why a faster one doesn't.

    Raises:
      UserError: the forced one is unknown, or can't serve the call.
    """
    reasons = {name: refuses(call) for name, refuses in IMPLEMENTATIONS.items()}
    return choose("attention", reasons, forced, call.platform)


def choose(what: str, reasons: Mapping[str, str | None], forced: str, platform: str) -> str:
    """The first name without a reason against it, or the forced one; says once why a faster one doesn't serve."""
    if forced != "auto":
        if forced not in reasons:
            raise UserError(f"model.kernel={forced!r} is unknown; choose from auto, {', '.join(reasons)}")
        reason = reasons[forced]
        if reason:
            raise UserError(f"model.kernel={forced} can't serve this model: {reason}; set model.kernel=auto")
        return forced
    for name, reason in reasons.items():
        if reason is None:
            return name
        if platform.split()[0] in PLATFORMS[name]:
            _say(f"{what} without {name}: {reason}")
    raise AssertionError("the plain form serves everything")


_targets: list[str] = []  # platforms that are compiled for, where it isn't this machine's own; the last one counts


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within the block programs are meant for another platform, as `platform_of` names it, than this machine's."""
    _targets.append(platform)
    try:
        yield
    finally:
        _targets.pop()


def platform_of(device_kind: str, platform: str) -> str:
    """The platform of a kind of device; of old TPUs with their version."""
    return device_kind.lower() if device_kind.startswith(OLD_TPUS) else platform


def default_platform() -> str:
    """The platform that computations run on unless said otherwise."""
    return _targets[-1] if _targets else platform_of(jax.devices()[0].device_kind, jax.default_backend())


@functools.cache
def _say(message: str) -> None:
    log.warning(message)
