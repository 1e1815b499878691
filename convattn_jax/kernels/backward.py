"""The backward kernels: a pass by queries (dq, query band) and one by keys (dk, dv, key band); no atomic addition.

    dS = P * (dP - delta)   delta_i = sum_j P_ij dP_ij   dq = content dS k   dk = content dS^T q   dv = P^T dO

With dropout (a mask M, f = 1 / (1 - rate)) the exponentials give fP: dS = fP * (M dP - delta / f), dv = (M fP)^T dO.

How often the tiles are walked is a matter of the block sizes (`Spec.one_pass`, `Spec.by_keys`, `Spec.whole_rows`):

    the pass by queries       delta                  then                       products
    one tile holds all        from P and dP          writes dk and dv too       5
    none (`Spec.by_keys`)     from P and dP          writes dq too              5
    a tile holds all keys     from P and dP          the pass by keys           7
    several tiles of keys     from the output, dO    the pass by keys           7

A band's gradient is stored slot by slot while dS is at hand; the thin products that turn it into gradients of q (or k)
and of the taps follow in the same program, the taps' as shares, summed afterwards in float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convattn_jax.kernels import bands, tile
from convattn_jax.kernels.forward import (
    Leaf,
    Operands,
    Saved,
    apart,
    band_shape,
    band_spec,
    operand_specs,
    packed,
    per_token,
    rows_spec,
)
from convattn_jax.kernels.tile import Band, Side, Spec


class Gradients(NamedTuple):
    """As `Operands`, those that have one; None for the rest."""

    q: Leaf
    k: Leaf
    v: Leaf
    beta: Leaf
    query_taps: Leaf
    key_taps: Leaf


class BandOutputs(NamedTuple):
    """The gradient of a band: its slots (read by the program that wrote them only), and the shares of the taps."""

    band: Leaf = None
    shares: Leaf = None  # (B, H, shares, width + 1, C), of the taps (where there are any) and in the last row of beta


class QkvGradients(NamedTuple):
    """Those of q, k, v that a pass writes; `packed` is that of the one array (B, T, H, 3, K) of all three."""

    q: Leaf = None
    k: Leaf = None
    v: Leaf = None
    packed: Leaf = None

    def store(self, spec: Spec, name: str, side: Side, value: Array) -> None:
        """Writes the rows of a side, in a kernel."""
        if self.packed is None:
            tile.store_rows(spec, getattr(self, name), side, value)
        else:
            tile.store_rows(spec, self.packed, side, value, self._fields.index(name))

    def load(self, spec: Spec, name: str, side: Side) -> Array:
        """Reads them again."""
        if self.packed is None:
            return tile.load_rows(spec, getattr(self, name), side)
        return tile.load_rows(spec, self.packed, side, self._fields.index(name))


class Outputs(NamedTuple):
    """What a pass writes: delta, where another pass follows, the gradients of q, k, v and of its bands."""

    qkv: QkvGradients
    delta: Leaf = None
    query_band: BandOutputs = BandOutputs()
    key_band: BandOutputs = BandOutputs()
    below: Leaf = None  # (B, H, parts * P) float32: summands of the query band's slot 0


def backward(spec: Spec, operands: Operands, saved: Saved, out: Array | None, d_out: Array) -> Gradients:
    """Gradients of everything differentiable."""
    if spec.by_keys:
        first = last = pass_by_keys(spec, operands, saved, d_out, None)
    else:
        first = last = pass_by_queries(spec, operands, saved, out, d_out)
    if not spec.one_pass:
        last = pass_by_keys(spec, operands, saved, d_out, first.delta, first.qkv.packed)
    query_taps, beta = _add_shares(first.query_band.shares, operands.query_taps, operands.beta)
    key_taps, _ = _add_shares(last.key_band.shares, operands.key_taps)
    return Gradients(
        first.qkv.q if last.qkv.packed is None else last.qkv.packed,
        last.qkv.k,
        last.qkv.v,
        beta=beta,
        query_taps=query_taps,
        key_taps=key_taps,
    )


def _add_shares(shares: Array | None, taps: Array | None, beta: Array | None = None) -> tuple[Leaf, Leaf]:
    """The gradients of taps and of beta, those there are."""
    if shares is None:
        return None, None
    # Held back: XLA would join later sums with this one, and read the shares for each of them anew.
    of_heads = jax.lax.optimization_barrier(jnp.sum(shares, axis=(0, 2)))
    of_beta = None if beta is None else of_heads[:, -1]
    if taps is None:
        return None, of_beta
    of_taps = of_heads[:, : taps.shape[1]]
    return (of_taps if taps.shape[0] > 1 else jnp.sum(of_taps, axis=0)).reshape(taps.shape), of_beta


def _qkv_outputs(spec: Spec, operands: Operands, names: str) -> tuple[QkvGradients, QkvGradients]:
    """(specs, shapes) of the gradients of q, k, v that a pass writes."""
    like = tile.shape(*operands.q.shape, dtype=operands.q.dtype)
    if packed(operands):
        return QkvGradients(packed=_packed_spec(spec)), QkvGradients(packed=like)
    return QkvGradients(**dict.fromkeys(names, rows_spec(spec))), QkvGradients(**dict.fromkeys(names, like))


def _packed_spec(spec: Spec) -> pl.BlockSpec:
    return pl.BlockSpec((None, spec.padded, None, 3, spec.width), lambda n, h, b: (b, 0, h, 0, 0))


def _band_outputs(
    spec: Spec, band: Band | None, taps: Array | None, beta: Array | None, shares: int, q: Array
) -> tuple[BandOutputs, BandOutputs]:
    """(specs, shapes) of a band's outputs."""
    if band is None:
        return BandOutputs(), BandOutputs()
    batch, _, heads = q.shape[:3]
    rows = (0 if taps is None else spec.width) + (beta is not None)
    sizes = (shares, rows, band.padded)
    specs = BandOutputs(
        band_spec(spec, band),
        pl.BlockSpec((None, None, *sizes), lambda n, h, b: (b, h, 0, 0, 0)),
    )
    shapes = BandOutputs(
        band_shape(spec, band, batch, heads),
        tile.shape(batch, heads, *sizes),
    )
    return specs, shapes


def _call(
    spec: Spec, kernel, name: str, size: tile.Tile, programs: int, inputs, in_specs, outputs, aliases=None
) -> Outputs:
    batch, _, heads = inputs[0].q.shape[:3]
    out_specs, out_shape = (Outputs(*parts) for parts in zip(*outputs, strict=True))
    return pl.pallas_call(
        lambda *refs: kernel(spec, *refs),
        name=name,
        input_output_aliases=aliases or {},
        grid=(programs, heads, batch),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=tile.compiler_params(size),
        interpret=spec.interpret,
    )(*inputs)


def _saved_specs(spec: Spec, rest: pl.BlockSpec | None = None) -> Saved:
    return Saved(per_token(spec), band_spec(spec, spec.query_band), band_spec(spec, spec.key_band), rest)


def _weights(spec: Spec, refs: Operands, saved: Saved, q, k, i: Side, j: Side, zone: int, below) -> Array:
    """fP of a tile, f = 1 / (1 - rate) the factor of dropout; the sides say which way it lies."""
    both = bands.Bands(spec, i, j, zone, (saved.query_band, saved.key_band), below)
    lse = saved.lse[pl.ds(i.start, i.size)]
    segments = refs.query_segments[pl.ds(i.start, i.size)] if refs.query_segments is not None else None
    down, across = (q, k) if i.axis == 0 else (k, q)
    product = tile.dot(spec, down, across, (1, 1)) if spec.content else None
    scores = both.scores(product, -lse - math.log2(1 - spec.rate))
    return tile.exp2(spec, tile.hide(spec, scores, i, j, segments, refs.key_segments))


def _dropped(spec: Spec, refs: Operands, i: Side, j: Side, x: Array) -> Array:
    return x if refs.factors is None else tile.drop(spec, i, j, refs.factors, x)


def _add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    return a[0] + b[0], a[1] + b[1]


# --- by queries ------------------------------------------------------------------------------------------------------


def pass_by_queries(spec: Spec, operands: Operands, saved: Saved, out: Array | None, d_out: Array) -> Outputs:
    """dq and delta, or all gradients where one tile holds everything."""
    batch, _, heads = operands.q.shape[:3]
    one, size = rows_spec(spec), spec.blocks.dq
    programs = spec.padded // size.queries
    no_band = BandOutputs(), BandOutputs()
    outputs = (
        _qkv_outputs(spec, operands, "qkv" if spec.one_pass else "q"),
        (None, None) if spec.one_pass else (per_token(spec), tile.shape(batch, heads, spec.padded)),
        _band_outputs(spec, spec.query_band, operands.query_taps, operands.beta, programs, operands.q),
        _band_outputs(spec, spec.key_band, operands.key_taps, None, 1, operands.q) if spec.one_pass else no_band,
    )
    return _call(
        spec,
        _query_kernel,
        "composite_attention_dq",
        size,
        programs,
        (apart(operands), saved, out, d_out),
        [
            operand_specs(spec, operands),
            _saved_specs(spec, None if saved.rest is None else one),
            None if out is None else one,
            one,
        ],
        outputs,
    )


def _query_kernel(spec: Spec, refs: Operands, saved: Saved, out_ref, d_out_ref, *output_refs):
    outputs = Outputs(*output_refs)
    size = spec.blocks.dq
    program = 0 if spec.one_pass else pl.program_id(0)
    i = Side(program * size.queries, size.queries, 0)
    below = bands.slot(spec.query_band, saved.query_band, i, 0) if spec.query_band else None
    q, d_out = tile.load_rows(spec, refs.q, i), tile.load_rows(spec, d_out_ref, i)
    delta = None
    if not spec.whole_rows:
        out = tile.load_rows(spec, out_ref, i).astype(jnp.float32)
        if saved.rest is not None:
            out += tile.load_rows(spec, saved.rest, i).astype(jnp.float32)
        delta = jnp.sum(out * d_out.astype(jnp.float32), axis=1)
        outputs.delta[pl.ds(i.start, i.size)] = delta

    def body(start, zone, carry):
        dq, ends = carry
        j = Side(start, size.keys, 1)
        k, v = tile.load_rows(spec, refs.k, j), tile.load_rows(spec, refs.v, j)
        weights = _weights(spec, refs, saved, q, k, i, j, zone, below)
        if spec.one_pass:  # before dP is there: the registers hold no third array
            dropped = _dropped(spec, refs, i, j, weights).astype(d_out.dtype)
            outputs.qkv.store(spec, "v", j, tile.dot(spec, dropped, d_out, (0, 0)))
        d_weights = _dropped(spec, refs, i, j, tile.dot(spec, d_out, v, (1, 1)))
        row_delta = i.total(weights * d_weights) if delta is None else delta
        if spec.whole_rows and not spec.one_pass:
            outputs.delta[pl.ds(i.start, i.size)] = row_delta
        d_scores = weights * (d_weights - i.spread(row_delta * (1 - spec.rate)))
        narrow = d_scores.astype(q.dtype)
        if spec.content:
            dq += tile.dot(spec, narrow, k)
        if spec.one_pass:
            _write_dk(spec, refs, outputs, q, k, d_scores, narrow, i, j, zone)
        if spec.query_band:
            ends = _add(ends, bands.band_gradient(spec, spec.query_band, outputs.query_band.band, i, j, d_scores, zone))
        return dq, ends

    none = jnp.zeros((i.size,), jnp.float32)
    dq, ends = tile.walk(spec, i, size.keys, body, (jnp.zeros(q.shape, jnp.float32), (none, none)))
    dq = dq * spec.content
    if spec.query_band:
        visited = -(-spec.length // size.keys) * size.keys
        band = bands.Gradient(*outputs.query_band, refs.query_taps, refs.beta is not None)
        dq = bands.finish_band(spec, spec.query_band, q, dq, ends, i, visited, band, program)
    outputs.qkv.store(spec, "q", i, dq)


def _write_dk(spec: Spec, refs: Operands, outputs: Outputs, q, k, d_scores, narrow, i: Side, j: Side, zone: int):
    """dk where one tile holds everything."""
    dk = tile.dot(spec, narrow, q, (0, 0)) * spec.content if spec.content else jnp.zeros(k.shape, jnp.float32)
    if spec.key_band:
        ends = bands.band_gradient(spec, spec.key_band, outputs.key_band.band, j, i, d_scores, -zone)
        band = bands.Gradient(*outputs.key_band, refs.key_taps)
        dk = bands.finish_band(spec, spec.key_band, k, dk, ends, j, i.size, band, 0)
    outputs.qkv.store(spec, "k", j, dk)


# --- by keys ---------------------------------------------------------------------------------------------------------


def pass_by_keys(
    spec: Spec, operands: Operands, saved: Saved, d_out: Array, delta: Array | None, onto: Array | None = None
) -> Outputs:
    """dk and dv, or all gradients; where q, k and v are one array, a pass by queries has written its part into `onto`.

    All gradients: a program holds all keys of a row and walks over its queries. A run of them has its dq at once, but
    what flows through their band waits for the end, when all have stored it. So does dq, in its place and its dtype: in
    bfloat16 it is rounded once more than in two passes, which leaves it closer than the plain form's.
    """
    size = spec.blocks.dkv or spec.blocks.dq
    programs = spec.padded // size.keys
    inputs = apart(operands), saved._replace(rest=None), d_out, delta
    query_band = spec.query_band if spec.by_keys else None
    outputs = (
        _qkv_outputs(spec, operands, "qkv" if spec.by_keys else "kv"),
        (None, None),
        _band_outputs(spec, query_band, operands.query_taps, operands.beta, programs, operands.q),
        _band_outputs(spec, spec.key_band, operands.key_taps, None, programs, operands.q),
        _below_outputs(spec, operands, size) if query_band else (None, None),
    )
    return _call(
        spec,
        _key_kernel,
        "composite_attention_dkv",
        size,
        programs,
        (*inputs, onto),
        [
            operand_specs(spec, operands),
            _saved_specs(spec),
            rows_spec(spec),
            None if delta is None else per_token(spec),
            None if onto is None else _packed_spec(spec),
        ],
        outputs,
        {} if onto is None else {len(jax.tree.leaves(inputs)): 0},
    )


def _below_outputs(spec: Spec, operands: Operands, size: tile.Tile):
    """(spec, shape) of the summands of slot 0."""
    batch, _, heads = operands.q.shape[:3]
    parts = bands.parts(size.keys)
    return per_token(spec, parts), tile.shape(batch, heads, spec.padded * parts)


def _key_kernel(spec: Spec, refs: Operands, saved: Saved, d_out_ref, delta_ref, onto_ref, *output_refs):
    del onto_ref  # the same memory as the gradient's
    outputs = Outputs(*output_refs)
    size, program = spec.blocks.dkv or spec.blocks.dq, 0 if spec.by_keys else pl.program_id(0)
    j = Side(program * size.keys, size.keys, 0)  # keys down: P^T and dS^T feed their products from registers
    k, v = tile.load_rows(spec, refs.k, j), tile.load_rows(spec, refs.v, j)

    def body(start, zone, carry):
        dk, dv, ends = carry
        i = Side(start, size.queries, 1)
        q, d_out = tile.load_rows(spec, refs.q, i), tile.load_rows(spec, d_out_ref, i)
        weights = _weights(spec, refs, saved, q, k, i, j, -zone, None)
        d_weights = tile.dot(spec, v, d_out, (1, 1))
        dropped = _dropped(spec, refs, i, j, weights)
        shares = dropped * d_weights
        delta = i.total(shares) if delta_ref is None else delta_ref[pl.ds(i.start, i.size)]
        if delta_ref is None:
            d_scores = tile.fma(spec, weights, i.spread(delta * (spec.rate - 1)), shares)
        elif refs.factors is None:
            d_scores = weights * (d_weights - i.spread(delta))
        else:  # the same with zeros taken from `dropped` instead of another draw
            d_scores = tile.fma(spec, dropped, d_weights, weights * i.spread(delta * (spec.rate - 1)))
        dv += tile.dot(spec, dropped.astype(d_out.dtype), d_out)
        narrow = d_scores.astype(q.dtype)
        if spec.content:
            dk += tile.dot(spec, narrow, q)
        if spec.key_band:
            ends = _add(ends, bands.band_gradient(spec, spec.key_band, outputs.key_band.band, j, i, d_scores, zone))
        if spec.by_keys:
            dq = tile.dot(spec, k, narrow, (0, 0)).T * spec.content if spec.content else jnp.zeros_like(q)
            outputs.qkv.store(spec, "q", i, dq)
            if spec.query_band:
                bands.scatter(spec, spec.query_band, outputs.query_band.band, outputs.below, i, j, d_scores)
        return dk, dv, ends

    zeros, none = jnp.zeros(k.shape, jnp.float32), jnp.zeros((j.size,), jnp.float32)
    dk, dv, ends = tile.walk(spec, j, size.queries, body, (zeros, zeros, (none, none)))
    outputs.qkv.store(spec, "v", j, dv)
    dk = dk * spec.content
    if spec.key_band:
        visited = -(-spec.length // size.queries) * size.queries
        band = bands.Gradient(*outputs.key_band, refs.key_taps)
        dk = bands.finish_band(spec, spec.key_band, k, dk, ends, j, visited, band, program)
    if spec.by_keys and spec.query_band:
        _finish_queries(spec, refs, outputs, size)
    outputs.qkv.store(spec, "k", j, dk)


def _finish_queries(spec: Spec, refs: Operands, outputs: Outputs, size: tile.Tile) -> None:
    """Adds to dq what flows through the band of the queries, where the pass by keys is all of backward."""
    band = spec.query_band
    assert band is not None
    tile.barrier(spec)
    i = Side(0, spec.padded, 0)
    walked = -(-spec.length // size.queries) * size.queries
    dq = outputs.qkv.load(spec, "q", i).astype(jnp.float32)
    below = jnp.zeros((i.size,), jnp.float32)
    for part in range(bands.parts(size.keys)):
        below += plgpu.load(outputs.below.at[part * spec.padded + i.ids], mask=i.ids < walked, other=0.0)
    complete = walked >= spec.padded and bands.folds(band, size.queries, size.keys)
    gradient = bands.Gradient(*outputs.query_band, refs.query_taps, refs.beta is not None, walked, complete)
    q = tile.load_rows(spec, refs.q, i)
    dq = bands.finish_band(spec, band, q, dq, (below, below), i, size.keys, gradient, 0)
    outputs.qkv.store(spec, "q", i, dq)
