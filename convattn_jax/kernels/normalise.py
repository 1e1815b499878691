"""`model.layers.add_norm` by the implementation that serves a call best.

The kernel's code is loaded where it serves.
"""

import functools

from jax import Array

from convattn_jax.kernels import choice
from convattn_jax.model import layers
from convattn_jax.model.layers import AddNorm


def add_norm_by(kernel: str) -> AddNorm:
    """The end of a sublayer that `model.kernel` names: `auto`, or an implementation that must serve every call."""
    return functools.partial(_add_norm, kernel)


def add_norm_implementation(platform: str, width: int, dtype: str, forced: str = "auto") -> str:
    """The name of the implementation that serves rows of a width; one without LayerNorm stands for the plain form."""
    reason = f"it runs on NVIDIA GPUs, not on {platform}"
    if platform in choice.PLATFORMS["pallas_gpu"]:
        from convattn_jax.kernels.add_norm import supports

        reason = supports(width, dtype)
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
    if name == "plain":
        return layers.add_norm(x, out, scale, bias, rate, seed, rows)
    from convattn_jax.kernels.add_norm import add_norm

    return add_norm(x, out, scale, bias, rate, seed, rows)
