"""The forward kernel: softmax(scores) v over tiles of keys, with the bands of taps; no array of T x T."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from convattn_jax.kernels import bands, tile
from convattn_jax.kernels.tile import Side, Spec

Leaf = Any  # an array; in a kernel its reference; in a call of Pallas its block


class Operands(NamedTuple):
    """What every pass reads; P is the padded length, G 1 or H, C slots rounded up to whole chunks."""

    q: Leaf  # (B, T, H, K), as k and v; or all three, (B, T, H, 3, K), and no others
    k: Leaf
    v: Leaf
    beta: Leaf | None  # (H, C) float32
    query_taps: Leaf | None  # (G, width, C) float32
    key_taps: Leaf | None
    query_segments: Leaf | None  # (B, P) int32, no padding query equal to any key
    key_segments: Leaf | None
    factors: tuple[Leaf, Leaf] | None  # (B, H, P) uint32: of queries and keys, for dropout


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    lse: Leaf  # (B, H, P) float32, log2 of the sum of exponentials; 0 where a query sees nothing
    query_band: Leaf | None  # (B, H, P * slots) float32
    key_band: Leaf | None
    rest: Leaf | None  # (B, T, H, K): the output minus what bfloat16 holds of it, which delta needs


def packed(operands: Operands) -> bool:
    """Whether queries, keys and values are one array."""
    return operands.k is None


def apart(operands: Operands) -> Operands:
    """What a call is given: the one array once for each of its parts, which `operand_specs` tells apart."""
    return operands._replace(k=operands.q, v=operands.q) if packed(operands) else operands


def rows_spec(spec: Spec) -> pl.BlockSpec:
    """The tokens of one (row, head), of an array (B, T, H, K)."""
    return pl.BlockSpec((None, spec.padded, None, spec.width), lambda n, h, b: (b, 0, h, 0))


def operand_specs(spec: Spec, operands: Operands) -> Operands:
    """Each program gets a whole (row, head) and picks its tiles itself."""

    def rows(part: int) -> pl.BlockSpec:
        if not packed(operands):
            return rows_spec(spec)
        return pl.BlockSpec((None, spec.padded, None, None, spec.width), lambda n, h, b: (b, 0, h, part, 0))

    segments = pl.BlockSpec((None, spec.padded), lambda n, h, b: (b, 0))
    beta = operands.beta
    return Operands(
        q=rows(0),
        k=rows(1),
        v=rows(2),
        beta=None if beta is None else pl.BlockSpec((None, beta.shape[1]), lambda n, h, b: (h, 0)),
        query_taps=_taps_spec(operands.query_taps),
        key_taps=_taps_spec(operands.key_taps),
        query_segments=None if operands.query_segments is None else segments,
        key_segments=None if operands.key_segments is None else segments,
        factors=None if operands.factors is None else (per_token(spec), per_token(spec)),
    )


def _taps_spec(taps: Array | None) -> pl.BlockSpec | None:
    if taps is None:
        return None
    heads, width, slots = taps.shape
    return pl.BlockSpec((None, width, slots), lambda n, h, b: (h if heads > 1 else 0, 0, 0))


def per_token(spec: Spec, slots: int = 1) -> pl.BlockSpec:
    """Numbers per token of one (row, head), of an array (B, H, P * slots)."""
    return pl.BlockSpec((None, None, spec.padded * slots), lambda n, h, b: (b, h, 0))


def band_spec(spec: Spec, band: tile.Band | None) -> pl.BlockSpec | None:
    """The block of a band's slots."""
    return None if band is None else per_token(spec, band.slots)


def band_shape(spec: Spec, band: tile.Band | None, rows: int, heads: int):
    """The array of a band's slots."""
    return None if band is None else tile.shape(rows, heads, spec.padded * band.slots)


def key_band(spec: Spec, operands: Operands) -> Array | None:
    """k_j . taps for every key, in the slots of the key band."""
    band, size = spec.key_band, spec.blocks.forward
    if band is None:
        return None
    rows, _, heads = operands.q.shape[:3]

    def kernel(k_ref, taps_ref, band_ref):
        j = Side(pl.program_id(0) * size.queries, size.queries, 0)
        bands.project_band(spec, band, tile.load_rows(spec, k_ref, j), taps_ref, None, band_ref, j)

    specs = operand_specs(spec, operands)
    return pl.pallas_call(
        kernel,
        name="composite_attention_keys",
        grid=(spec.padded // size.queries, heads, rows),
        in_specs=[specs.k, specs.key_taps],
        out_specs=band_spec(spec, spec.key_band),
        out_shape=band_shape(spec, spec.key_band, rows, heads),
        compiler_params=tile.compiler_params(size),
        interpret=spec.interpret,
    )(apart(operands).k, operands.key_taps)


def forward(spec: Spec, operands: Operands) -> tuple[Array, Saved]:
    """The output (B, T, H, K) and what the backward pass needs."""
    rows, _, heads = operands.q.shape[:3]
    size = spec.blocks.forward
    by_key = key_band(spec, operands)
    one, like = rows_spec(spec), tile.shape(rows, spec.length, heads, spec.head_size, dtype=operands.q.dtype)
    with_rest = spec.half and not spec.whole_rows
    out, lse, by_query, rest = pl.pallas_call(
        lambda *refs: _kernel(spec, *refs),
        name="composite_attention_forward",
        grid=(spec.padded // size.queries, heads, rows),
        in_specs=[operand_specs(spec, operands), band_spec(spec, spec.key_band)],
        out_specs=[one, per_token(spec), band_spec(spec, spec.query_band), one if with_rest else None],
        out_shape=[
            like,
            tile.shape(rows, heads, spec.padded),
            band_shape(spec, spec.query_band, rows, heads),
            like if with_rest else None,
        ],
        compiler_params=tile.compiler_params(size),
        interpret=spec.interpret,
    )(apart(operands), by_key)
    return out, Saved(lse, by_query, by_key, rest)


def _kernel(spec: Spec, refs: Operands, key_band_ref, out_ref, lse_ref, query_band_ref, rest_ref):
    size = spec.blocks.forward
    i = Side(pl.program_id(0) * size.queries, size.queries, 0)
    q = tile.load_rows(spec, refs.q, i)

    def keys_and_values(j: Side) -> tuple[Array | None, Array]:
        return tile.load_rows(spec, refs.k, j) if spec.content else None, tile.load_rows(spec, refs.v, j)

    # Where one tile holds all keys they are asked for now, to be there when wanted; a loop asks ahead by itself.
    all_keys = keys_and_values(Side(0, size.keys, 1)) if size.keys >= spec.length else None
    segments = refs.query_segments[pl.ds(i.start, i.size)] if refs.query_segments is not None else None
    below = None
    if spec.query_band:
        bands.project_band(spec, spec.query_band, q, refs.query_taps, refs.beta, query_band_ref, i)
        tile.barrier(spec)
        below = bands.slot(spec.query_band, query_band_ref, i, 0)

    def body(start, zone, carry):
        out, top, total = carry
        j = Side(start, size.keys, 1)
        both = bands.Bands(spec, i, j, zone, (query_band_ref, key_band_ref), below)
        k, v = all_keys or keys_and_values(j)
        product = None if k is None else tile.dot(spec, q, k, (1, 1))
        scores, factor, offset = both.affine(product)
        scores = tile.hide(spec, scores, i, j, segments, refs.key_segments)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor + offset)
        finite_top = jnp.where(new_top == tile.HIDDEN, 0.0, new_top) if spec.masked else new_top
        weights = tile.exp2(spec, tile.fma(spec, scores, factor, (offset - finite_top)[:, None]))
        shrink = tile.exp2(spec, top - finite_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        if refs.factors is not None:
            weights = tile.drop(spec, i, j, refs.factors, weights)
        return out * shrink[:, None] + tile.dot(spec, weights.astype(v.dtype), v), new_top, total

    empty = (
        jnp.zeros((i.size, spec.width), jnp.float32),
        jnp.full((i.size,), -math.inf, jnp.float32),
        jnp.zeros((i.size,), jnp.float32),
    )
    out, top, total = tile.walk(spec, i, size.keys, body, empty)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out = out * (1 / ((1 - spec.rate) * total))[:, None]
    tile.store_rows(spec, out_ref, i, out)
    if rest_ref is not None:
        tile.store_rows(spec, rest_ref, i, out - out.astype(out_ref.dtype).astype(jnp.float32))
    lse_ref[pl.ds(i.start, i.size)] = jnp.where(seen, top + jnp.log2(total), 0.0)
