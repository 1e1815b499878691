"""The forward kernel for TPUs: softmax(scores) v, tile of keys after tile of keys; no array of T x T."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from convattn_jax.kernels.tpu import tile
from convattn_jax.kernels.tpu.operands import Operands, Spec, blocks, by_tokens, compiler_params


def forward(spec: Spec, operands: Operands, dtype: DTypeLike) -> tuple[Array, Array]:
    """The output (B, H, P, K) in `dtype`, and (B, H, 1, P) log2 of the sums of exponentials, 0 where all is hidden."""
    batch, heads, padded, head_size = operands.q.shape
    in_specs = blocks(spec, operands, query_axis=0)
    return pl.pallas_call(
        lambda *refs: _kernel(spec, *refs),
        name="composite_attention_forward",
        grid=(batch, heads, spec.tiles, spec.tiles),
        in_specs=[in_specs],
        out_specs=[in_specs.q, by_tokens(spec.edge, 1, 0)],
        out_shape=[
            jax.ShapeDtypeStruct(operands.q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((spec.edge, head_size), jnp.float32),
            pltpu.VMEM((spec.edge, spec.lanes), jnp.float32),
            pltpu.VMEM((spec.edge, spec.lanes), jnp.float32),
        ],
        compiler_params=compiler_params(),
        interpret=spec.interpret,
    )(operands)


def _kernel(spec: Spec, refs: Operands, out_ref, lse_ref, sum_ref, top_ref, total_ref):
    """`top` and `total`, the maximum and the sum of each query, stand in every lane."""
    queries, keys = pl.program_id(2), pl.program_id(3)

    @pl.when(keys == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, tile.LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)

    def body(near: bool) -> None:
        scores = tile.scores(spec, refs, queries, keys, True, near)
        top = jnp.maximum(top_ref[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - top[:, :1])
        shrink = jnp.exp2(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        kept = tile.kept(spec, refs, True)
        if kept is not None:
            weights = jnp.where(kept, weights, 0.0)
        v = refs.v[...]
        sum_ref[...] = sum_ref[...] * shrink[:, :1] + tile.dot(spec, weights.astype(v.dtype), v)

    tile.on_each(spec, queries, keys, body)

    @pl.when(keys == spec.tiles - 1)
    def _():
        seen = total_ref[...] > 0
        total = jnp.where(seen, total_ref[...], 1.0)
        out_ref[...] = (sum_ref[...] * (1 / ((1 - spec.rate) * total[:, :1]))).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(seen, top_ref[...] + jnp.log2(total), 0.0).T[:1]
