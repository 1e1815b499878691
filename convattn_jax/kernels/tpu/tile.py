"""What the TPU kernels do on one tile of queries and keys; scores are in units of log 2.

Tiles are square. The side that lies *down* a tile has its numbers in columns, the other, *across*, in rows.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from convattn_jax.kernels.tpu import bands
from convattn_jax.kernels.tpu.bands import column
from convattn_jax.kernels.tpu.operands import Operands, Spec
from convattn_jax.model.dropout import keep_product

LOG2E = math.log2(math.e)
HIDDEN, LOWEST = -3e30, -1e30  # of a score that is masked; of a row's maximum, so that 2**(HIDDEN - maximum) is 0


def dot(spec: Spec, a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """a times b over the given axes, summed in float32; float32 operands are not rounded to bfloat16."""
    if spec.interpret:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def on_each(spec: Spec, queries: Array, keys: Array, body: Callable[[bool], None]) -> None:
    """body(near): whether the tile may meet a band; a band is narrower than a tile."""
    if spec.query_band is None and spec.key_band is None:
        body(False)
    elif spec.tiles == 1:
        body(True)
    else:
        near = jnp.abs(queries - keys) <= 1
        pl.when(near)(lambda: body(True))
        pl.when(jnp.logical_not(near))(lambda: body(False))


def spread(spec: Spec, row: Array, down: bool) -> Array:
    """A number per token, (1, edge), along its side of the tile."""
    return column(spec, row) if down else row


def scores(spec: Spec, refs: Operands, queries: Array, keys: Array, queries_down: bool, near: bool) -> Array:
    """The scores of a tile, HIDDEN where query i doesn't see key j."""
    q, k = refs.q[...], refs.k[...]
    total = jnp.zeros((spec.edge, spec.edge), jnp.float32)
    if spec.content:
        total = dot(spec, *((q, k) if queries_down else (k, q)), (1, 1)) * (spec.content * LOG2E)
    if spec.query_band and refs.query_slots is not None:
        slots = refs.query_slots[...] * LOG2E
        total += bands.bias(spec, spec.query_band, slots, queries_down, keys - queries, near)
    if spec.key_band and refs.key_slots is not None:
        slots = refs.key_slots[...] * LOG2E
        total += bands.bias(spec, spec.key_band, slots, not queries_down, queries - keys, near)
    if refs.query_segments is not None and refs.key_segments is not None:
        query_segments = spread(spec, refs.query_segments[...], queries_down)
        key_segments = spread(spec, refs.key_segments[...], not queries_down)
        total = jnp.where(query_segments == key_segments, total, HIDDEN)
    return total


def kept(spec: Spec, refs: Operands, queries_down: bool) -> Array | None:
    """The mask of attention dropout, bit by bit that of `convattn_jax.model.dropout.keep_pairs`; None: all is kept."""
    if refs.query_factors is None or refs.key_factors is None:
        return None
    of_queries, of_keys = (
        spread(spec, ref[...], down).astype(jnp.uint32)
        for ref, down in ((refs.query_factors, queries_down), (refs.key_factors, not queries_down))
    )
    return keep_product(of_queries, of_keys, spec.rate)
