"""Attention with relative positions as one differentiable call of the fused kernels.

    score_ij = scale * (content q_i.k_j + q_i.w^Q[c(j-i)] + k_j.w^K[c(i-j)]) + beta_h[c(j-i)]

(Chang et al. 2021, section 3; c clips to [-n, n]). Softmax ignores a constant added to a row, so the taps that depend
on the row only, w^Q and beta, lose their last slot to the others: 2n numbers per token.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

from convattn_jax.kernels import backward as backward_pass
from convattn_jax.kernels import blocks as block_table
from convattn_jax.kernels import forward as forward_pass
from convattn_jax.kernels import inputs
from convattn_jax.kernels.forward import Operands
from convattn_jax.kernels.tile import Band, Spec
from convattn_jax.model.attention import QKV
from convattn_jax.model.dropout import pair_factors


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
    blocks: block_table.Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """sum_j dropout(softmax_j(score_ij)) v_j, forward and backward without any array of T x T.

    Args:
      qkv: queries, keys and values; where they are one array, so is their gradient, and nothing is copied.
      fixed: beta, float32.
      dynamic_query, dynamic_key: w^Q and w^K, float32, shared by all heads or with a leading axis of H.
      content: the factor of q_i.k_j beside `scale`; False leaves the product out.
      query_segments, key_segments: query i sees key j iff the numbers agree and are not 0; both None: all see all.
        A query that sees nothing gives 0 and has no gradient.
      dropout_seed: none, no dropout. Bits are those of `convattn_jax.model.dropout.keep_pairs`.
      rows, heads: the numbers of these rows and heads in the whole batch, where a device holds a part of it.
      blocks: tile sizes other than the table's.
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
        blocks,
        interpret,
    )
    return _attention(spec, operands)


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
    blocks: block_table.Blocks | None = None,
    interpret: bool = False,
) -> tuple[Spec, Operands]:
    """What the kernels take, of what `composite_attention` takes: slots, padded segments, factors for seeds."""
    q, k, v = qkv if isinstance(qkv, tuple) else (qkv, None, None)
    batch, length, head_count = q.shape[:3]
    head_size = q.shape[-1]
    reason = inputs.supports(length, length if k is None else k.shape[1], head_size, q.dtype)
    if reason:
        raise ValueError(f"composite_attention: {reason}")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("composite_attention: query_segments and key_segments come together")
    query_radius = inputs.common_radius(length, fixed, dynamic_query)
    key_radius = inputs.common_radius(length, dynamic_key)
    spec = Spec(
        length=length,
        head_size=head_size,
        content=float(content) * scale,
        query_band=None if query_radius is None else Band(query_radius, above=False),
        key_band=None if key_radius is None else Band(key_radius, above=True),
        masked=key_segments is not None,
        rate=0.0 if dropout_seed is None else dropout_rate,
        half=q.dtype == jnp.bfloat16,
        blocks=blocks or block_table.choose(length, head_size, q.dtype, bool(query_radius or key_radius)),
        interpret=interpret,
    )
    segments = (None, None)
    if query_segments is not None and key_segments is not None:
        segments = inputs.padded_segments(query_segments, key_segments, spec.padded)
    operands = Operands(
        q,
        k,
        v,
        beta=_slots(spec.query_band, fixed),
        query_taps=_slots(spec.query_band, _tall(spec, dynamic_query, scale)),
        key_taps=_slots(spec.key_band, _tall(spec, dynamic_key, scale)),
        query_segments=segments[0],
        key_segments=segments[1],
        factors=pair_factors(dropout_seed, batch, head_count, spec.padded, rows, heads)
        if dropout_seed is not None and spec.rate
        else None,
    )
    return spec, operands


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: Spec, operands: Operands) -> Array:
    return forward_pass.forward(spec, operands)[0]


def _attention_forward(spec: Spec, operands: Operands):
    out, saved = forward_pass.forward(spec, operands)
    return out, (operands, saved, None if spec.whole_rows else out)


def _attention_backward(spec: Spec, residuals, d_out: Array):
    operands, saved, out = residuals
    gradients = backward_pass.backward(spec, operands, saved, out, d_out)
    return (Operands(*gradients, query_segments=None, key_segments=None, factors=None),)


_attention.defvjp(_attention_forward, _attention_backward)


# --- taps as slots ---------------------------------------------------------------------------------------------------


def _slots(band: Band | None, taps: Array | None) -> Array | None:
    """What the kernels read of taps: slots, rounded up to whole chunks."""
    if band is None or taps is None:
        return None
    slots = inputs.slots(taps, band.radius, band.above)
    return jnp.pad(slots, [(0, 0)] * (slots.ndim - 1) + [(0, band.padded - band.slots)])


def _tall(spec: Spec, taps: Array | None, scale: float) -> Array | None:
    """(G, width, W), scaled: zeros under the rows of the head size."""
    if taps is None:
        return None
    taps = scale * (taps if taps.ndim == 3 else taps[None])
    return jnp.pad(taps, [(0, 0), (0, spec.width - spec.head_size), (0, 0)])
