"""How queries, keys and values are made of the hidden states: linearly, or by a convolution in the linear map's place.

(Chang et al. 2021, section 4.) Each kind is a function on arrays, the module that owns its parameters, and a row of
PROJECTIONS. Where one of the three is a convolution, hidden states at padding count as zero for all three.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from convattn_jax.config import check, check_choice
from convattn_jax.model import convolution
from convattn_jax.model.attention import QKV
from convattn_jax.model.convolution import Convolve, Kernel
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.layers import Linear, kernel_init, linear


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """One projection's kind and shape; `configs/base.py` documents each key."""

    kind: str
    radius: int
    groups: int
    activation: bool
    half: bool


def taps_init(width: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(W), 1/sqrt(W)), PyTorch's start of a depthwise Conv1d, which the reference keeps."""

    def init(key, shape, dtype=jnp.float32):
        return nn.initializers.uniform(2 * width**-0.5)(key, shape, dtype) - width**-0.5

    return init


class Depthwise(nn.Module):
    """The parameters of a depthwise convolution: taps (W, *channels) and a bias (*channels)."""

    channels: tuple[int, ...]
    radius: int
    activation: bool = False

    @nn.compact
    def __call__(self) -> Kernel:
        width = 2 * self.radius + 1
        taps = self.param("taps", taps_init(width), (width, *self.channels))
        return Kernel(taps, self.param("bias", nn.initializers.zeros, self.channels), self.activation)


class ProjectionModule(nn.Module):
    """What every projection shares: a shape, and perhaps a depthwise convolution in front of its own part."""

    config: ProjectionConfig
    width: int
    heads: tuple[int, int]

    def kernel(self) -> Kernel | None:
        """The depthwise convolution whose result takes the place of the hidden states, or part of it; None without."""
        return None

    def __call__(self, x: Float[Array, "B T D"], inputs: Inputs, convolved: Array | None) -> Float[Array, "B T H K"]:
        """The projection of x, given what `kernel` makes of it."""
        raise NotImplementedError


def project(
    modules: Sequence[ProjectionModule], x: Float[Array, "B T D"], inputs: Inputs, convolve: Convolve
) -> tuple[Float[Array, "B T D"], QKV]:
    """x, for what else reads it (see `Convolve`), and its queries, keys and values, each by its module.

    Three linear maps are one product, which reads x once, forward and backward. Depthwise convolutions, if any, are one
    call, which may do the same.
    """
    linear_ones = [module for module in modules if isinstance(module, LinearProjection)]
    if len(linear_ones) == len(modules):
        kernels, biases = zip(*(module.weights() for module in linear_ones), strict=True)
        # a head's three parts are neighbours: a device that holds some of the heads holds a run of columns
        return x, linear(x, jnp.stack(kernels, axis=2), jnp.stack(biases, axis=1))
    kernels = [module.kernel() for module in modules]
    wanted = [kernel for kernel in kernels if kernel is not None]
    x, outs = convolve(x, wanted, inputs) if wanted else (x, ())  # which never reads padding
    convolved, clean = iter(outs), x
    if any(module.config.kind in CONVOLUTIONS for module in modules):
        clean = x * inputs.valid[..., None].astype(x.dtype)
    q, k, v = (
        module(clean, inputs, None if kernel is None else next(convolved))
        for module, kernel in zip(modules, kernels, strict=True)
    )
    return x, (q, k, v)


class LinearProjection(ProjectionModule):
    """x W + b."""

    @nn.compact
    def weights(self) -> tuple[Float[Array, "D H K"], Float[Array, "H K"]]:
        """W and b."""
        kernel = self.param("kernel", kernel_init, (self.width, *self.heads))
        return kernel, self.param("bias", nn.initializers.zeros, self.heads)

    def __call__(self, x: Float[Array, "B T D"], inputs: Inputs, convolved: Array | None) -> Float[Array, "B T H K"]:
        """x W + b; there is nothing convolved."""
        return linear(x, *self.weights())


class SeparableProjection(ProjectionModule):
    """Depthwise convolution over all D channels, gelu unless switched off, then a linear map."""

    def setup(self):
        """Names the two parts."""
        self.depthwise = Depthwise((self.width,), self.config.radius, self.config.activation)
        self.pointwise = Linear((self.width,), self.heads)

    def kernel(self) -> Kernel:
        """The first part."""
        return self.depthwise()

    def __call__(self, x: Float[Array, "B T D"], inputs: Inputs, convolved: Array | None) -> Float[Array, "B T H K"]:
        """The linear map of what the first part gave."""
        assert convolved is not None
        return self.pointwise(convolved)


class GroupedProjection(ProjectionModule):
    """Convolution in `groups` groups of channels; one group is a dense convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], inputs: Inputs, convolved: Array | None) -> Float[Array, "B T H K"]:
        taps, groups = 2 * self.config.radius + 1, self.config.groups
        kernel = self.param("kernel", kernel_init, (taps, self.width // groups, *self.heads))
        bias = self.param("bias", nn.initializers.zeros, self.heads)
        return convolution.grouped(x, kernel, groups, inputs) + bias.astype(x.dtype)


class NoProjection(ProjectionModule):
    """The hidden states themselves, cut into heads."""

    def __call__(self, x: Float[Array, "B T D"], inputs: Inputs, convolved: Array | None) -> Float[Array, "B T H K"]:
        """x, its channels cut into heads."""
        return x.reshape(*x.shape[:2], *self.heads)


class Projection(NamedTuple):
    """A row of the table."""

    module: Callable[..., ProjectionModule]
    equation: str
    cost: str  # multiply-adds beyond a linear projection's B T D^2


PROJECTIONS: dict[str, Projection] = {
    "linear": Projection(LinearProjection, "x W", "0"),
    "separable": Projection(SeparableProjection, "gelu(depthwise(x)) W", "B T D W"),
    "grouped": Projection(GroupedProjection, "grouped_convolution(x)", "B T D^2 (W/groups - 1)"),
    "none": Projection(NoProjection, "x", "-B T D^2"),
}
CONVOLUTIONS = ("separable", "grouped")


def check_projection(field: str, config: ProjectionConfig, width: int, heads: int, head_size: int) -> None:
    """Raises a `UserError` where there is no such projection, or it cannot have this shape."""
    check_choice(f"{field}.kind", config.kind, PROJECTIONS)
    for name in ("radius", "groups"):
        check(getattr(config, name) >= 1, f"{field}.{name}={getattr(config, name)} must be at least 1")
    outputs = heads * head_size
    if config.half:
        check(heads % 2 == 0, f"{field}.half needs an even number of heads, not model.heads={heads}")
        check(config.kind in CONVOLUTIONS, f"{field}.half has no meaning for {field}.kind={config.kind}")
        outputs //= 2
    if config.kind == "none":
        check(
            heads * head_size == width,
            f"{field}.kind=none needs model.heads x model.head_size = {heads} x {head_size} to be model.width={width}",
        )
    if config.kind == "grouped":
        check(
            width % config.groups == 0 and outputs % config.groups == 0,
            f"{field}.groups={config.groups} must divide model.width={width} and the {outputs} outputs",
        )


class HalfConvolutional(ProjectionModule):
    """A convolution for the first half of the heads, a linear map for the second."""

    def setup(self):
        """Names the two halves."""
        half = (self.heads[0] // 2, self.heads[1])
        self.convolved = PROJECTIONS[self.config.kind].module(self.config, self.width, half)
        self.linear = Linear((self.width,), half)

    def kernel(self) -> Kernel | None:
        """The first half's."""
        return self.convolved.kernel()

    def __call__(self, x: Float[Array, "B T D"], inputs: Inputs, convolved: Array | None) -> Float[Array, "B T H K"]:
        """The convolution's heads, then the linear map's."""
        return jnp.concatenate([self.convolved(x, inputs, convolved), self.linear(x)], axis=2)


def projection(config: ProjectionConfig, width: int, heads: tuple[int, int], name: str) -> ProjectionModule:
    """The module of a configuration."""
    return (HalfConvolutional if config.half else PROJECTIONS[config.kind].module)(config, width, heads, name=name)
