"""What adds to attention's output, before the output projection: functions, modules, one table."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from convattn_jax.model.convolution import Kernel, convolve
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.projections import Depthwise
from convattn_jax.model.term import TAPS_INIT, TermShape


def depthwise_branch(
    v: Float[Array, "B T H K"], kernel: Kernel, scale: Float[Array, " H"], inputs: Inputs
) -> Float[Array, "B T H K"]:
    """s_h DWConv(v)_i, on the projected values with padding zeroed (Chang et al. 2021, section 4)."""
    clean = v * inputs.valid[..., None, None].astype(v.dtype)
    return convolve(clean, [kernel], inputs)[1][0] * scale[:, None].astype(v.dtype)


def relative_values(alpha: Float[Array, "B H T S"], taps: Float[Array, "K W"]) -> Float[Array, "B T H K"]:
    """sum_j alpha_ij b[c(j-i)], alpha after dropout: embeddings added to the values (Shaw et al. 2018, equation 3)."""
    queries, keys = alpha.shape[-2:]
    radius = taps.shape[-1] // 2
    distance = jnp.clip(jnp.arange(keys) - jnp.arange(queries)[:, None], -radius, radius) + radius
    hot = (distance[..., None] == jnp.arange(taps.shape[-1])).astype(alpha.dtype)
    weight = jnp.einsum("bhts,tsw->bthw", alpha, hot)  # attention that each tap receives
    return jnp.einsum("bthw,kw->bthk", weight, taps.astype(alpha.dtype))


class DepthwiseBranch(nn.Module):
    """Module of `depthwise_branch` with s_h = 1: taps (W, H, K), bias (H, K)."""

    shape: TermShape
    scaled: bool = False

    @nn.compact
    def __call__(self, v: Array, alpha: Array | None, inputs: Inputs) -> Array:
        s = self.shape
        scale = self.param("scale", nn.initializers.ones, (s.heads,)) if self.scaled else jnp.ones(s.heads)
        return depthwise_branch(v, Depthwise((s.heads, s.head_size), s.radius, name="convolution")(), scale, inputs)


class ScaledDepthwiseBranch(DepthwiseBranch):
    """The same with a trained s_h, (H,)."""

    scaled: bool = True


class RelativeValues(nn.Module):
    """Module of `relative_values`: taps (K, W)."""

    shape: TermShape

    @nn.compact
    def __call__(self, v: Array, alpha: Array | None, inputs: Inputs) -> Array:
        assert alpha is not None
        s = self.shape
        taps = self.param("taps", TAPS_INIT[s.taps_init].dynamic(s.taps), (s.head_size, s.taps))
        return relative_values(alpha, taps).astype(v.dtype)


class Branch(NamedTuple):
    """A row of the table; `needs_map`: it reads the attention map, so no fused kernel can serve the layer."""

    module: Callable[..., nn.Module]
    equation: str
    cost: str
    needs_map: bool = False


BRANCHES: dict[str, Branch] = {
    "depthwise": Branch(DepthwiseBranch, "DWConv(v)_i", "B T D W"),
    "depthwise_scaled": Branch(ScaledDepthwiseBranch, "s_h DWConv(v)_i", "B T D W"),
    "relative_values": Branch(RelativeValues, "sum_j alpha_ij b[c(j-i)]", "B H T^2 W", needs_map=True),
}
