"""Convolutions along the sequence that stay within a text: a tap that lands on padding or another segment is zero.

B batch, T position, D channels, W = 2n + 1 taps, C = D / groups channels of a group. As in PyTorch's Conv1d, tap w of
position t meets position t + w - n.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Num

from convattn_jax.model.inputs import Inputs
from convattn_jax.model.layers import gelu


def neighbour(x: Num[Array, "B T *rest"], offset: int) -> Num[Array, "B T *rest"]:
    """x at t + offset; zero beyond the ends."""
    length = x.shape[1]
    if abs(offset) >= length:
        return jnp.zeros_like(x)
    pad = [(0, 0)] * x.ndim
    pad[1] = (max(-offset, 0), max(offset, 0))
    return jnp.pad(x, pad)[:, max(offset, 0) : max(offset, 0) + length]


def reachable(inputs: Inputs, offset: int) -> Int[Array, "B T"]:
    """1 where the token at t + offset is there, is no padding and is of t's segment, else 0."""
    keys = neighbour(inputs.key_segments, offset)
    return ((keys == inputs.query_segments) & (keys != 0)).astype(jnp.int32)


def depthwise(
    x: Float[Array, "B T *channels"], taps: Float[Array, "W *channels"], inputs: Inputs
) -> Float[Array, "B T *channels"]:
    """out[t, d] = sum_w taps[w, d] x[t + w - n, d], as shifted multiply-adds, which XLA fuses."""
    width = taps.shape[0]
    out = jnp.zeros_like(x)
    for tap in range(width):
        offset = tap - width // 2
        there = reachable(inputs, offset).reshape(*x.shape[:2], *(1,) * (x.ndim - 2)).astype(x.dtype)
        out += neighbour(x, offset) * there * taps[tap].astype(x.dtype)
    return out


class Kernel(NamedTuple):
    """A depthwise convolution's parameters, and whether gelu follows."""

    taps: Float[Array, "W *channels"]
    bias: Float[Array, "*channels"]
    activation: bool = False


Convolve = Callable[[Array, Sequence[Kernel], Inputs], tuple[Array, tuple[Array, ...]]]  # as `convolve`


def convolve(
    x: Float[Array, "B T *channels"], kernels: Sequence[Kernel], inputs: Inputs
) -> tuple[Array, tuple[Array, ...]]:
    """x itself, and what each kernel makes of it, as plain array operations: the meaning of every faster form.

    A faster form adds up x's gradient as it writes it; what else reads x should read the one that is returned, so that
    its share is in that sum.
    """
    sums = [depthwise(x, kernel.taps, inputs) + kernel.bias.astype(x.dtype) for kernel in kernels]
    return x, tuple(gelu(total) if kernel.activation else total for kernel, total in zip(kernels, sums, strict=True))


def grouped(
    x: Float[Array, "B T D"], kernel: Float[Array, "W C *out"], groups: int, inputs: Inputs
) -> Float[Array, "B T *out"]:
    """out[t, o] = sum_w sum_c kernel[w, c, o] x[t + w - n, c of o's group]; one group is a dense convolution."""
    width, channels = kernel.shape[:2]
    flat = kernel.reshape(width, channels, groups, -1).astype(x.dtype)
    out = jnp.zeros((*x.shape[:2], groups, flat.shape[-1]), x.dtype)
    for tap in range(width):
        offset = tap - width // 2
        there = neighbour(x, offset) * reachable(inputs, offset)[..., None].astype(x.dtype)
        out += jnp.einsum("btgc,cgo->btgo", there.reshape(*x.shape[:2], groups, channels), flat[tap])
    return out.reshape(*x.shape[:2], *kernel.shape[2:])
