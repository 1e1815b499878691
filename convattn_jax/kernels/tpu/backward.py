"""The backward kernels for TPUs: a pass by queries (dq, query slots) and one by keys (dk, dv, key slots), seven
products; where one tile holds everything, both at once, five products.

    dS = P * (dP - delta)   delta_i = sum_j P_ij dP_ij   dq = content dS k   dk = content dS^T q   dv = P^T dO

Every sum is made by one program, in order: no atomic addition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from convattn_jax.kernels.tpu import bands, tile
from convattn_jax.kernels.tpu.operands import Leaf, Operands, Spec, blocks, by_tokens, compiler_params


class Inputs(NamedTuple):
    """What both passes read."""

    operands: Operands
    lse: Leaf  # (B, H, 1, P) float32, as `forward` gives it
    delta: Leaf  # (B, H, 1, P) float32
    d_out: Leaf  # (B, H, P, K)


def backward(spec: Spec, inputs: Inputs) -> Operands:
    """Gradients of everything differentiable, None for the rest."""
    of = inputs.operands._replace(query_segments=None, key_segments=None, query_factors=None, key_factors=None)
    if spec.tiles == 1:
        return _call(spec, _whole_kernel, "composite_attention_backward", 0, inputs, of)
    of_queries = of._replace(k=None, v=None, key_slots=None)
    of_keys = of._replace(q=None, query_slots=None)
    by_queries = _call(spec, _query_kernel, "composite_attention_dq", 0, inputs, of_queries)
    by_keys = _call(spec, _key_kernel, "composite_attention_dkv", 1, inputs, of_keys)
    return by_queries._replace(k=by_keys.k, v=by_keys.v, key_slots=by_keys.key_slots)


def _call(spec: Spec, kernel, name: str, query_axis: int, inputs: Inputs, of: Operands) -> Operands:
    """Gradients of those operands in `of` that are not None; the kernel gets memory for the sums of each."""
    batch, heads, _, head_size = inputs.operands.q.shape
    in_specs = blocks(spec, inputs.operands, query_axis)
    per_query = by_tokens(spec.edge, 1, query_axis)
    rows = pltpu.VMEM((spec.edge, head_size), jnp.float32) if spec.tiles > 1 else None
    query_slots, key_slots = (bands.sums(spec, band) for band in (spec.query_band, spec.key_band))
    memory = Operands(rows, rows, rows, query_slots, key_slots, None, None, None, None)
    return pl.pallas_call(
        lambda refs, *more: kernel(spec, refs, Operands(*more[: len(of)]), Operands(*more[len(of) :])),
        name=name,
        grid=(batch, heads, spec.tiles, spec.tiles),
        in_specs=[Inputs(in_specs, per_query, per_query, in_specs.q)],
        out_specs=_only(of, in_specs),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), of),
        scratch_shapes=_only(of, memory),
        compiler_params=compiler_params(),
        interpret=spec.interpret,
    )(inputs)


def _only(of: Operands, values: Operands) -> Operands:
    return Operands(*(None if x is None else value for x, value in zip(of, values, strict=True)))


def _clear(sums: Operands) -> None:
    for ref in sums:
        if ref is not None:
            ref[...] = jnp.zeros_like(ref)


class _Tile(NamedTuple):
    """Of one tile."""

    kept_weights: Array  # P after dropout but for its factor
    d_scores: Array


def _gradient(spec: Spec, refs: Inputs, queries: Array, keys: Array, queries_down: bool, near: bool) -> _Tile:
    lse, delta = (tile.spread(spec, ref[...], queries_down) for ref in (refs.lse, refs.delta))
    weights = kept_weights = jnp.exp2(tile.scores(spec, refs.operands, queries, keys, queries_down, near) - lse)
    d_out, v = refs.d_out[...], refs.operands.v[...]
    d_weights = tile.dot(spec, *((d_out, v) if queries_down else (v, d_out)), (1, 1))
    kept = tile.kept(spec, refs.operands, queries_down)
    if kept is not None:
        d_weights = jnp.where(kept, d_weights * (1 / (1 - spec.rate)), 0.0)
        kept_weights = jnp.where(kept, weights, 0.0)
    return _Tile(kept_weights, weights * (d_weights - delta))


def _query_kernel(spec: Spec, refs: Inputs, outputs: Operands, sums: Operands):
    queries, keys = pl.program_id(2), pl.program_id(3)
    pl.when(keys == 0)(lambda: _clear(sums))

    def body(near: bool) -> None:
        _, d_scores = _gradient(spec, refs, queries, keys, True, near)
        if spec.content:
            k = refs.operands.k[...]
            sums.q[...] += tile.dot(spec, d_scores.astype(k.dtype), k)
        if spec.query_band:
            bands.add(spec, spec.query_band, sums.query_slots, d_scores, keys - queries, near)

    tile.on_each(spec, queries, keys, body)

    @pl.when(keys == spec.tiles - 1)
    def _():
        outputs.q[...] = (sums.q[...] * spec.content).astype(outputs.q.dtype)
        if spec.query_band:
            bands.write(spec, spec.query_band, sums.query_slots, outputs.query_slots)


def _key_kernel(spec: Spec, refs: Inputs, outputs: Operands, sums: Operands):
    """Keys lie down the tile, so that P and dS come as their products want them."""
    keys, queries = pl.program_id(2), pl.program_id(3)
    pl.when(queries == 0)(lambda: _clear(sums))

    def body(near: bool) -> None:
        kept_weights, d_scores = _gradient(spec, refs, queries, keys, False, near)
        d_out, q = refs.d_out[...], refs.operands.q[...]
        sums.v[...] += tile.dot(spec, kept_weights.astype(d_out.dtype), d_out)
        if spec.content:
            sums.k[...] += tile.dot(spec, d_scores.astype(q.dtype), q)
        if spec.key_band:
            bands.add(spec, spec.key_band, sums.key_slots, d_scores, queries - keys, near)

    tile.on_each(spec, queries, keys, body)

    @pl.when(queries == spec.tiles - 1)
    def _():
        outputs.k[...] = (sums.k[...] * spec.content).astype(outputs.k.dtype)
        outputs.v[...] = (sums.v[...] * (1 / (1 - spec.rate))).astype(outputs.v.dtype)
        if spec.key_band:
            bands.write(spec, spec.key_band, sums.key_slots, outputs.key_slots)


def _whole_kernel(spec: Spec, refs: Inputs, outputs: Operands, sums: Operands):
    queries, keys = pl.program_id(2), pl.program_id(3)
    kept_weights, d_scores = _gradient(spec, refs, queries, keys, True, True)
    d_out, q, k = refs.d_out[...], refs.operands.q[...], refs.operands.k[...]
    dv = tile.dot(spec, kept_weights.astype(d_out.dtype), d_out, (0, 0))
    outputs.v[...] = (dv * (1 / (1 - spec.rate))).astype(outputs.v.dtype)
    narrow = d_scores.astype(q.dtype)
    for output, a, b in ((outputs.q, (narrow, k), (1, 0)), (outputs.k, (narrow, q), (0, 0))):
        product = tile.dot(spec, *a, b) if spec.content else jnp.zeros(output.shape, jnp.float32)
        output[...] = (product * spec.content).astype(output.dtype)
    _clear(sums)
    if spec.query_band:
        bands.add(spec, spec.query_band, sums.query_slots, d_scores, keys - queries, True)
        bands.write(spec, spec.query_band, sums.query_slots, outputs.query_slots)
    if spec.key_band:
        bands.add(spec, spec.key_band, sums.key_slots, d_scores.T, queries - keys, True)
        bands.write(spec, spec.key_band, sums.key_slots, outputs.key_slots)
