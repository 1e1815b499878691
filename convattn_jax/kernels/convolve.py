"""`model.convolution.convolve` by the implementation that serves a call best."""

import functools
from collections.abc import Sequence

from jax import Array

from convattn_jax.kernels import choice
from convattn_jax.kernels.depthwise import depthwise_convolutions, supports
from convattn_jax.model import convolution
from convattn_jax.model.convolution import Convolve, Kernel
from convattn_jax.model.inputs import Inputs


def convolve_by(kernel: str) -> Convolve:
    """The convolution function that `model.kernel` names: `auto`, or an implementation that must serve every call."""
    return functools.partial(_convolve, kernel)


def convolution_implementation(platform: str, radii: Sequence[int], dtype: str, forced: str = "auto") -> str:
    """The name of the implementation that serves convolutions of one array; as `choice.implementation`."""
    others = dict.fromkeys(choice.IMPLEMENTATIONS, "it has no depthwise convolution")
    on_gpu = platform in ("gpu", "cuda")
    reason = supports(radii, dtype) if on_gpu else f"it runs on NVIDIA GPUs, not on {platform}"
    return choice.choose("depthwise convolution", {**others, "pallas_gpu": reason, "plain": None}, forced, platform)


def _convolve(kernel: str, x: Array, kernels: Sequence[Kernel], inputs: Inputs) -> tuple[Array, ...]:
    radii = [one.taps.shape[0] // 2 for one in kernels]
    if convolution_implementation(choice.default_platform(), radii, x.dtype.name, kernel) == "plain":
        return convolution.convolve(x, kernels, inputs)
    return depthwise_convolutions(x, kernels, inputs.query_segments, inputs.key_segments)
