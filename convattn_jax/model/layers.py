"""The parts every variant shares: layer normalisation, gelu and linear maps, functions then modules.

B batch, T position, D hidden width.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Integer

from convattn_jax.model.dropout import Seed, dropout

LAYER_NORM_EPS = 1e-12
kernel_init = nn.initializers.normal(0.02)
ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # Abramowitz & Stegun 1964, 7.1.26
ERFC_SCALE = 0.3275911


@jax.custom_vjp
def layer_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"]) -> Float[Array, "... D"]:
    """Normalises the last axis; statistics in float32 or better (Ba et al. 2016)."""
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return (centred * inverse * scale + bias).astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    """From x and two numbers a row: what differentiation of the forward pass keeps in float32 is several times that."""
    x, mean, inverse, scale = saved
    wide = gradient.astype(mean.dtype)
    normal = (x.astype(mean.dtype) - mean) * inverse
    scaled = wide * scale
    along = (scaled * normal).mean(-1, keepdims=True)
    d_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normal * along)
    rows = tuple(range(x.ndim - 1))
    return d_x.astype(x.dtype), (wide * normal).sum(rows).astype(scale.dtype), wide.sum(rows).astype(scale.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def add_norm(
    x: Float[Array, "B T D"],
    out: Float[Array, "B T D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    rate: float,
    seed: Seed | None,
    rows: Integer[Array, " B"] | None = None,
) -> Float[Array, "B T D"]:
    """LN(x + dropout(out)), the end of a sublayer; `rows` as in `dropout`."""
    return layer_norm(x + dropout(out, rate, seed, rows), scale, bias)


AddNorm = Callable[..., Array]  # the signature of `add_norm`


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x Phi(x), exactly (Hendrycks & Gimpel 2016); the backward pass keeps x alone."""
    return _gelu_forward(x)[0]


def _normal_cdf(x: Array, bell: Array, half: bool) -> Array:
    """Phi(x), of x and `bell` = exp(-x^2 / 2); for half precision within 8e-8, by a quarter of the instructions."""
    if not half:
        return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    root = jax.lax.rsqrt(1 + ERFC_SCALE * math.sqrt(0.5) * jnp.abs(x))
    t, tail = root * root, 0.0
    for coefficient in ERFC:
        tail = (tail + 0.5 * coefficient) * t
    return jnp.where(x < 0, tail * bell, 1 - tail * bell)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    bell = jnp.exp(wide * wide * -0.5)
    return (wide * _normal_cdf(wide, bell, wide.dtype != x.dtype)).astype(x.dtype), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    # the barrier: what both passes compute from x would otherwise be kept, in float32, rather than computed again
    wide = jax.lax.optimization_barrier(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    bell = jnp.exp(wide * wide * -0.5)
    slope = _normal_cdf(wide, bell, wide.dtype != x.dtype) + wide * bell * (1 / math.sqrt(2 * math.pi))
    return ((gradient * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def wide_product(equation: str, a: Array, b: Array) -> Array:
    """An einsum accumulated and returned in float32 or better; on CPU, which lacks such products, operands widen."""
    wide = jnp.promote_types(a.dtype, jnp.float32)

    def on_cpu(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a.astype(wide), b.astype(wide))

    def elsewhere(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=wide)

    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=elsewhere)


class Linear(nn.Module):
    """x W + b over the last `len(inputs)` axes of x, to new axes `outputs`; in the type of x."""

    inputs: Sequence[int]
    outputs: Sequence[int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", kernel_init, (*self.inputs, *self.outputs))
        bias = self.param("bias", nn.initializers.zeros, tuple(self.outputs))
        return linear(x, kernel, bias, len(self.inputs))


def linear(x: Array, kernel: Array, bias: Array, contracted: int = 1) -> Array:
    """The product as one plain matrix product with a bias, which compilers know how to join: axes folded around it."""
    inputs, outputs = kernel.shape[:contracted], kernel.shape[contracted:]
    batch = x.shape[: x.ndim - contracted]
    rows = x.reshape(-1, math.prod(inputs))
    product = rows @ kernel.reshape(math.prod(inputs), -1).astype(x.dtype) + bias.reshape(-1).astype(x.dtype)
    return product.reshape(*batch, *outputs)


class LayerNorm(nn.Module):
    """The parameters of `layer_norm`, of x alone or at the end of a sublayer (`add_norm`)."""

    width: int
    add_norm: AddNorm = add_norm

    @nn.compact
    def __call__(self, x: Array, out: Array | None = None, rate: float = 0.0, seed: Seed | None = None) -> Array:
        scale = self.param("scale", nn.initializers.ones, (self.width,))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        return layer_norm(x, scale, bias) if out is None else self.add_norm(x, out, scale, bias, rate, seed)
