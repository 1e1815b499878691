"""`model.layers.add_norm` by the implementation that serves a call best."""

import functools

from jax import Array

from convattn_jax.kernels import add_norm, choice
from convattn_jax.model import layers
from convattn_jax.model.layers import AddNorm


def add_norm_by(kernel: str) -> AddNorm:
    """The end of a sublayer that `model.kernel` names: `auto`, or an implementation that must serve every call."""
    return functools.partial(_add_norm, kernel)


def add_norm_implementation(platform: str, width: int, dtype: str, forced: str = "auto") -> str:
    """The name of the implementation that serves rows of a width; one without LayerNorm stands for the plain form."""
    on_gpu = platform in ("gpu", "cuda")
    reason = add_norm.supports(width, dtype) if on_gpu else f"it runs on NVIDIA GPUs, not on {platform}"
    rows = {"pallas_gpu": reason, "plain": None}
    return choice.choose("LayerNorm", rows, forced if forced in ("auto", *rows) else "plain", platform)


def _add_norm(
    kernel: str,
    x: Array,
    out: Array,
    scale: Array,
    bias: Array,
    rate: float,
    seed: Array | None,
    rows: Array | None = None,
) -> Array:
    name = add_norm_implementation(choice.default_platform(), x.shape[2], x.dtype.name, kernel)
    function = layers.add_norm if name == "plain" else add_norm.add_norm
    return function(x, out, scale, bias, rate, seed, rows)
