"""`model.convolution.convolve` by the implementation that serves a call best.

The kernel's code is loaded where it serves.
"""

import functools
from collections.abc import Sequence

from jax import Array

from convattn_jax.kernels import choice
from convattn_jax.model import convolution
from convattn_jax.model.convolution import Convolve, Kernel
from convattn_jax.model.inputs import Inputs


def convolve_by(kernel: str) -> Convolve:
    """The convolution function that `model.kernel` names: `auto`, or an implementation that must serve every call."""
    return functools.partial(_convolve, kernel)


def convolution_implementation(platform: str, radii: Sequence[int], dtype: str, forced: str = "auto") -> str:
    """The name of the implementation that serves convolutions; one that has none stands for the plain form."""
    reason = f"it runs on NVIDIA GPUs, not on {platform}"
    if platform in choice.PLATFORMS["pallas_gpu"]:
        from convattn_jax.kernels.depthwise import supports

        reason = supports(radii, dtype)
    rows = {"pallas_gpu": reason, "plain": None}
    return choice.choose("depthwise convolution", rows, forced if forced in ("auto", *rows) else "plain", platform)


def _convolve(kernel: str, x: Array, kernels: Sequence[Kernel], inputs: Inputs) -> tuple[Array, tuple[Array, ...]]:
    radii = [one.taps.shape[0] // 2 for one in kernels]
    if convolution_implementation(choice.default_platform(), radii, x.dtype.name, kernel) == "plain":
        return convolution.convolve(x, kernels, inputs)
    from convattn_jax.kernels.depthwise import depthwise_convolutions

    return depthwise_convolutions(x, kernels, inputs.query_segments, inputs.key_segments)
