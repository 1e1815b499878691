"""What mixes the positions of a layer: attention, or a convolution in its place. Modules of one signature, one table.

W taps, n = radius, H heads (Wu et al. call them channel groups), K head size, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from convattn_jax.model.attention import drop, masked_softmax, visible, weighted_values
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.convolution import neighbour, reachable
from convattn_jax.model.dropout import Seed
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.layers import Linear, wide_product
from convattn_jax.model.operations import PLAIN, Operations
from convattn_jax.model.projections import Depthwise, taps_init
from convattn_jax.model.self_attention import SelfAttention

Mixed = tuple[Float[Array, "B T D"], Float[Array, "B T D"], dict[str, Array]]  # as of `SelfAttention`


# --- Wu et al. 2019: convolutions with softmax-normalised taps, no content term ---


def lightweight(
    v: Float[Array, "B T H K"], logits: Float[Array, "#B #T H W"], inputs: Inputs
) -> Float[Array, "B T H K"]:
    """out_i = sum_w softmax(logits_i)_w v[i + w - n]: taps shared by a head's channels (Wu et al. 2019, section 3)."""
    taps = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.zeros_like(v)
    for tap in range(taps.shape[-1]):
        offset = tap - taps.shape[-1] // 2
        there = reachable(inputs, offset)[..., None, None].astype(v.dtype)
        out += neighbour(v, offset) * there * taps[..., tap, None]
    return out


class LightweightConvolution(nn.Module):
    """Gated linear unit, lightweight convolution with taps (H, W), output projection (Wu et al. 2019, figure 2)."""

    config: ModelConfig
    operations: Operations = PLAIN

    @nn.compact
    def __call__(
        self, x: Array, inputs: Inputs, seed: Seed | None, shared: Mapping[str, Any], outputs: tuple[str, ...] = ()
    ) -> Mixed:
        c = self.config
        heads = (c.heads, c.head_size)
        value, gate = (Linear((c.width,), heads, name=name)(x) for name in ("value", "gate"))
        v = value * jax.nn.sigmoid(gate)
        out = lightweight(v, self.logits(v), inputs)
        return x, Linear(heads, (c.width,), name="output")(out), {}

    def logits(self, v: Float[Array, "B T H K"]) -> Float[Array, "#B #T H W"]:
        """The same taps at every position."""
        c = self.config
        return self.param("taps", taps_init(c.taps), (c.heads, c.taps))[None, None]


class DynamicConvolution(LightweightConvolution):
    """The same with taps linear in the position's own value: kernel (H, K, H, W) (Wu et al. 2019, section 4)."""

    def logits(self, v: Float[Array, "B T H K"]) -> Float[Array, "#B #T H W"]:
        """Taps of each position."""
        c = self.config
        return Linear((c.heads, c.head_size), (c.heads, c.taps), name="taps")(v)


# --- Jiang et al. 2020, ConvBERT: half of the heads attend, half convolve over a span ---


def span_scores(kernels: Float[Array, "B T H W"], *, by_key: bool) -> Float[Array, "B H T S"]:
    """kernels[i, j-i] inside the window, -10000 outside; `by_key`: kernels[j, j-i], as the reference code has it."""
    length, width = kernels.shape[1], kernels.shape[-1]
    distance = np.arange(length) - np.arange(length)[:, None]  # j - i
    inside = np.abs(distance) <= width // 2
    hot = (distance[..., None] + width // 2 == np.arange(width)) & inside[..., None]
    equation = "bshw,tsw->bhts" if by_key else "bthw,tsw->bhts"
    scores = jnp.einsum(equation, kernels, jnp.asarray(hot, kernels.dtype))
    return jnp.where(inside, scores, -10_000.0)


class SpanDynamicConvolution(nn.Module):
    """First half of the heads content attention, second half span-based dynamic convolution.

    kernel_i = Linear(q_i * separable(x)_i), softmax over the window (Jiang et al. 2020, section 3.2).
    """

    config: ModelConfig
    operations: Operations = PLAIN
    as_reference: bool = False

    @nn.compact
    def __call__(
        self, x: Array, inputs: Inputs, seed: Seed | None, shared: Mapping[str, Any], outputs: tuple[str, ...] = ()
    ) -> Mixed:
        c = self.config
        half, heads = (c.heads // 2, c.head_size), (c.heads, c.head_size)
        clean = x * inputs.valid[..., None].astype(x.dtype)
        kernel = Depthwise((c.width,), c.radius, name="span_depthwise")()
        clean, (span,) = self.operations.convolve(clean, [kernel], inputs)
        q, k = (Linear((c.width,), half, name=name)(clean) for name in ("query", "key"))
        v = Linear((c.width,), heads, name="value")(clean)
        span = Linear((c.width,), half, name="span_pointwise")(span)
        kernels = Linear(half, (half[0], c.taps), name="span_kernel")(q * span)

        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.concatenate(
            [
                wide_product("bthk,bshk->bhts", q, k) * c.head_size**-0.5,
                span_scores(kernels.astype(wide), by_key=self.as_reference),
            ],
            axis=1,
        )
        alpha = self.normalised(scores, inputs)
        out = weighted_values(drop(alpha, c.attention_dropout, seed), v)
        asked = {"attention": alpha} if "attention" in outputs else {}
        return x, Linear(heads, (c.width,), name="output")(out), asked

    def normalised(self, scores: Float[Array, "B H T S"], inputs: Inputs) -> Float[Array, "B H T S"]:
        """Softmax over what is visible; a convolving head sees its window only."""
        c = self.config
        sees = visible(inputs.query_segments, inputs.key_segments)
        distance = np.arange(scores.shape[-1]) - np.arange(scores.shape[-2])[:, None]
        inside = jnp.asarray(np.abs(distance) <= c.radius)
        sees = jnp.broadcast_to(sees, scores.shape)
        convolves = (jnp.arange(c.heads) >= c.heads // 2)[:, None, None]
        return masked_softmax(scores, sees & (inside | ~convolves))


class ReferenceSpanDynamicConvolution(SpanDynamicConvolution):
    """As the authors' code computes it: the kernel of the key's position, and -10000 instead of exclusion.

    For loading its checkpoints; ConvBERT means the kernel of the query's position.
    """

    as_reference: bool = True

    def normalised(self, scores: Float[Array, "B H T S"], inputs: Inputs) -> Float[Array, "B H T S"]:
        """Softmax with -10000 added to what is not visible."""
        sees = visible(inputs.query_segments, inputs.key_segments)
        return jax.nn.softmax(scores + jnp.where(sees, 0.0, -10_000.0).astype(scores.dtype), axis=-1)


class Mixer(NamedTuple):
    """A row of the table; `uses`: the model keys beside heads and head_size that have a meaning for it."""

    module: Callable[..., nn.Module]
    equation: str
    cost: str
    uses: tuple[str, ...] = ()


MIXERS: dict[str, Mixer] = {
    "attention": Mixer(
        SelfAttention, "", "B T^2 D", ("scores", "rotation", "branches", "query_key", "value", "radius", "taps_init")
    ),
    "lightweight": Mixer(LightweightConvolution, "sum_w softmax(taps)_w v[i+w-n]", "B T D W", ("radius",)),
    "dynamic": Mixer(DynamicConvolution, "sum_w softmax(v_i W)_w v[i+w-n]", "B T D (W + H W)", ("radius",)),
    "convbert": Mixer(
        SpanDynamicConvolution,
        "half q_i.k_j/sqrt(K), half softmax_w(W (q_i * separable(x)_i))",
        "1.5 B T^2 D + B T D W",
        ("radius",),
    ),
    "convbert_reference": Mixer(
        ReferenceSpanDynamicConvolution, "the same with the key's kernel", "1.5 B T^2 D + B T D W", ("radius",)
    ),
}
