"""Attention with relative positions as one differentiable call of the TPU kernels: `kernels.composite` for TPUs.

    score_ij = scale * (content q_i.k_j + q_i.w^Q[c(j-i)] + k_j.w^K[c(i-j)]) + beta_h[c(j-i)]

The thin products between tokens and taps stand outside the kernels, where XLA differentiates them; the kernels take
slots per token (`kernels.inputs`) and give the gradients of these.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, UInt32

from convattn_jax.kernels import inputs
from convattn_jax.kernels.tpu import backward as backward_pass
from convattn_jax.kernels.tpu import forward as forward_pass
from convattn_jax.kernels.tpu.operands import LANES, Operands, Spec
from convattn_jax.model.attention import QKV, separate
from convattn_jax.model.dropout import pair_factors

EDGES = (512, 384, 256)  # of a tile, the largest that divides the padded length, else LANES; never timed


def composite_attention(
    qkv: QKV,
    *,
    fixed: Float[Array, "H W"] | None = None,
    dynamic_query: Float[Array, "*G K W"] | None = None,
    dynamic_key: Float[Array, "*F K V"] | None = None,
    content: bool | float = True,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B T"] | None = None,
    scale: float = 1.0,
    dropout_rate: float = 0.0,
    dropout_seed: UInt32[Array, "2"] | None = None,
    rows: Int[Array, "B"] | UInt32[Array, "B"] | None = None,
    heads: Int[Array, "H"] | UInt32[Array, "H"] | None = None,
    edge: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """sum_j dropout(softmax_j(score_ij)) v_j, as `kernels.composite.composite_attention`, whose arguments these are.

    Args:
      edge: queries and keys of a tile, instead of the choice by length.
      interpret: run the kernels' bodies on the CPU.
    """
    spec, operands = prepare(
        qkv,
        fixed,
        dynamic_query,
        dynamic_key,
        content,
        query_segments,
        key_segments,
        scale,
        dropout_rate,
        dropout_seed,
        rows,
        heads,
        edge,
        interpret,
    )
    out: Array = _attention(spec, operands)
    return out[:, :, : jax.tree.leaves(qkv)[0].shape[1]].swapaxes(1, 2)


def prepare(
    qkv: QKV,
    fixed: Array | None = None,
    dynamic_query: Array | None = None,
    dynamic_key: Array | None = None,
    content: bool | float = True,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    scale: float = 1.0,
    dropout_rate: float = 0.0,
    dropout_seed: Array | None = None,
    rows: Array | None = None,
    heads: Array | None = None,
    edge: int | None = None,
    interpret: bool = False,
) -> tuple[Spec, Operands]:
    """What the kernels take, of what `composite_attention` takes: slots per token, whole tiles, factors for seeds."""
    q, k, v = separate(qkv)
    batch, length, head_count, head_size = q.shape
    reason = inputs.supports(length, k.shape[1], head_size, q.dtype)
    if reason:
        raise ValueError(f"composite_attention: {reason}")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("composite_attention: query_segments and key_segments come together")
    edge = edge or choose_edge(length)
    padded = -(-length // edge) * edge
    query_radius = inputs.common_radius(length, fixed, dynamic_query)
    key_radius = inputs.common_radius(length, dynamic_key)
    if query_segments is None and padded > length:
        query_segments = key_segments = jnp.ones((batch, length), jnp.int32)
    spec = Spec(
        edge=edge,
        tiles=padded // edge,
        content=float(content) * scale,
        query_band=None if query_radius is None else inputs.Band(query_radius, above=False),
        key_band=None if key_radius is None else inputs.Band(key_radius, above=True),
        rate=0.0 if dropout_seed is None else dropout_rate,
        interpret=interpret,
    )
    for band in (spec.query_band, spec.key_band):
        if band is not None and 2 * band.radius > spec.lanes:
            raise ValueError(f"composite_attention: taps reach {band.radius} positions, more than {spec.lanes // 2}")
    segments = factors = None, None
    if query_segments is not None and key_segments is not None:
        segments = tuple(x[:, None] for x in inputs.padded_segments(query_segments, key_segments, padded))
    if dropout_seed is not None and spec.rate:
        pairs = pair_factors(dropout_seed, batch, head_count, padded, rows, heads)
        factors = tuple(lax.bitcast_convert_type(x, jnp.int32)[:, :, None] for x in pairs)
    operands = Operands(
        _by_head(q, padded),
        _by_head(k, padded),
        _by_head(v, padded),
        query_slots=_slots(spec.query_band, q, fixed, dynamic_query, scale, padded),
        key_slots=_slots(spec.key_band, k, None, dynamic_key, scale, padded),
        query_segments=segments[0],
        key_segments=segments[1],
        query_factors=factors[0],
        key_factors=factors[1],
    )
    return spec, operands


def choose_edge(length: int) -> int:
    """Queries and keys of a tile: the length itself where one tile holds it, in whole lanes."""
    padded = -(-length // LANES) * LANES
    return next((edge for edge in EDGES if padded % edge == 0), LANES)


def _by_head(x: Float[Array, "B T H K"], padded: int) -> Float[Array, "B H P K"]:
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - x.shape[1]), (0, 0)))


def _slots(
    band: inputs.Band | None, x: Array, bias: Array | None, taps: Array | None, scale: float, padded: int
) -> Float[Array, "B H C P"] | None:
    """What a band adds to the scores, a column per token."""
    if band is None:
        return None
    batch, length, heads, _ = x.shape
    slots = jnp.zeros((batch, heads, band.slots, length), jnp.float32)
    if taps is not None:
        by_head = scale * inputs.slots(taps if taps.ndim == 3 else taps[None], band.radius, band.above)
        by_head = jnp.broadcast_to(by_head, (heads, *by_head.shape[1:]))
        slots += jnp.einsum("bthk,hkc->bhct", x.astype(jnp.float32), by_head, precision=lax.Precision.HIGHEST)
    if bias is not None:
        slots += inputs.slots(bias, band.radius, band.above)[:, :, None]
    return jnp.pad(slots, ((0, 0), (0, 0), (0, 0), (0, padded - length)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: Spec, operands: Operands) -> Array:
    return forward_pass.forward(spec, operands, operands.q.dtype)[0]


def _attention_forward(spec: Spec, operands: Operands):
    out, lse = forward_pass.forward(spec, operands, jnp.float32)  # delta needs more of it than bfloat16 holds
    return out.astype(operands.q.dtype), (operands, out, lse)


def _attention_backward(spec: Spec, residuals, d_out: Array):
    operands, out, lse = residuals
    delta = jnp.sum(out * d_out.astype(jnp.float32), axis=-1)[:, :, None]
    return (backward_pass.backward(spec, backward_pass.Inputs(operands, lse, delta, d_out)),)


_attention.defvjp(_attention_forward, _attention_backward)
