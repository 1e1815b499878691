"""The two passes of the depthwise-convolution kernel: forward, and the gradient of everything at once.

A program owns a block of channels and walks along a text, a chunk of positions at a time; a thread holds its channel's
window of rows in registers, so that a row is loaded once for all taps of all convolutions. A chunk with tokens of
several segments is convolved once for each of them, the others' rows as zeros.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convattn_jax.kernels import tile
from convattn_jax.kernels.depthwise_program import (
    Ahead,
    Chunk,
    Conditions,
    Operands,
    Program,
    Row,
    Segments,
    Spec,
    Weights,
    both,
    bounded,
    convolved,
    only,
    raw_rows,
)


def _specs(spec: Spec, operands: Operands, segments: Segments) -> tuple[Any, Operands, Segments]:
    """The blocks of rows (B, T, D), of the operands and of the segments."""
    walk = spec.walk
    rows = _whole(operands.x)
    taps, biases = jax.tree.map(
        lambda array: pl.BlockSpec((array.shape[0], walk.channels), lambda n, d, b: (0, d)), operands[1:]
    )
    by_text = jax.tree.map(lambda array: pl.BlockSpec((walk.texts, array.shape[1]), lambda n, d, b: (b, 0)), segments)
    return rows, Operands(rows, taps, biases), by_text


def _whole(array: Any) -> pl.BlockSpec:
    """All of an array (B, T, D): a program finds its texts and channels itself (see `bounded`)."""
    return pl.BlockSpec(array.shape, lambda n, d, b: (0, 0, 0))


def _whole_blocks(spec: Spec, operands: Operands) -> Operands:
    more = ((0, 0), (0, spec.blocks * spec.walk.channels - spec.channels))
    return Operands(operands.x, *jax.tree.map(lambda array: jnp.pad(array, more), operands[1:]))


def _call(spec: Spec, kernel, name: str, inputs, in_specs, out_specs, out_shape):
    walk, batch = spec.walk, inputs[0].x.shape[0]
    return pl.pallas_call(
        lambda *refs: kernel(Program.of(spec, batch), *refs),
        name=name,
        grid=(spec.runs, spec.blocks, batch // walk.texts),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=walk.warps, num_stages=1),
        interpret=spec.interpret,
    )(*inputs)


def forward(
    spec: Spec, operands: Operands, segments: Segments, differentiated: bool
) -> tuple[tuple[Array, ...], tuple[Array | None, ...]]:
    """Each convolution of x, with its bias and gelu, in the type of x, and gelu's derivative, in words, if wanted."""
    operands, (batch, _, size) = _whole_blocks(spec, operands), operands.x.shape
    like = jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype)
    words = jax.ShapeDtypeStruct((batch, spec.length_in_words, size), jnp.int32 if spec.half else jnp.float32)
    rows, *specs = _specs(spec, operands, segments)
    slopes = [activation and differentiated for activation in spec.activations]
    return _call(
        spec,
        _forward_kernel,
        "depthwise_forward",
        (operands, segments),
        specs,
        ((rows,) * len(slopes), tuple(_whole(words) if wanted else None for wanted in slopes)),
        ((like,) * len(slopes), tuple(words if wanted else None for wanted in slopes)),
    )


def start_reading(at: Program, x_ref, segments: Segments, text: Array, first: Array) -> tuple[list[Row], Ahead]:
    """What the first chunk of a walk finds read."""
    spec = at.spec
    before = raw_rows(at, x_ref, text, first * spec.walk.chunk - spec.reach, 2 * spec.reach)
    return [row.astype(jnp.float32) for row in before], Ahead.load(at, x_ref, segments, text, first)


def _forward_kernel(at: Program, refs: Operands, segments: Segments, out_refs, slope_refs) -> None:
    spec, walk = at.spec, at.spec.walk
    first = pl.program_id(0) * (walk.run // walk.chunk)
    last = jnp.minimum(first + walk.run // walk.chunk, spec.chunks)

    weights = Weights.load(refs)

    def of_chunk(text: Array, number: Array, read: tuple[list[Row], Ahead]) -> tuple[list[Row], Ahead]:
        chunk = Chunk.of(spec, segments, text, number, *read)
        sums, ahead = convolved(at, weights, chunk, lambda: Ahead.load(at, refs.x, segments, text, number + 1))
        for out_ref, slope_ref, activation, totals in zip(out_refs, slope_refs, spec.activations, sums, strict=True):
            values, slopes = zip(*(at.gelu(total) if activation else (total, total) for total in totals), strict=True)
            for u, value in enumerate(values):
                place = chunk.start + u
                at.store(out_ref, text, place, value, None if spec.whole_chunks else place < spec.length)
            if slope_ref is not None:
                for u in range(0, walk.chunk, spec.per_word):
                    place, word = chunk.words + u // spec.per_word, at.packed(slopes[u : u + spec.per_word])
                    at.store(slope_ref, text, place, word, None if spec.whole_chunks else place < spec.length_in_words)
        return chunk.window[walk.chunk :], ahead

    def of_text(text: Array, carry: None) -> None:
        read = start_reading(at, refs.x, segments, text, first)
        lax.fori_loop(first, last, lambda number, read: of_chunk(text, number, read), read)

    lax.fori_loop(0, walk.texts, of_text, None)


def backward(
    spec: Spec,
    operands: Operands,
    segments: Segments,
    slopes: tuple[Array | None, ...],
    d_elsewhere: Array,
    d_outs: tuple[Array, ...],
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """Gradients of x, in its type, `d_elsewhere` added, and of taps and biases, in float32.

    A program writes its share of the taps' gradient, the bias's in the last row; the shares are summed outside.
    """
    operands, (batch, _, _) = _whole_blocks(spec, operands), operands.x.shape
    rows, *specs = _specs(spec, operands, segments)
    size = spec.walk.channels
    heights = [2 * radius + 2 for radius in spec.radii]
    share_specs = [pl.BlockSpec((None, None, height, size), lambda n, d, b: (b, n, 0, d)) for height in heights]
    share = (batch // spec.walk.texts, spec.runs)
    d_x, shares = _call(
        spec,
        _backward_kernel,
        "depthwise_backward",
        (operands, segments, slopes, d_outs, d_elsewhere),
        [*specs, tuple(None if slope is None else _whole(slope) for slope in slopes), (rows,) * len(heights), rows],
        (rows, tuple(share_specs)),
        (
            jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype),
            tuple(tile.shape(*share, height, spec.blocks * size) for height in heights),
        ),
    )
    sums = [jnp.sum(part, axis=(0, 1))[:, : spec.channels] for part in shares]
    return d_x, tuple(part[:-1] for part in sums), tuple(part[-1:] for part in sums)


def _backward_kernel(
    at: Program, refs: Operands, segments: Segments, slope_refs, d_out_refs, d_elsewhere_ref, d_x_ref, share_refs
) -> None:
    spec, walk = at.spec, at.spec.walk
    run, per_run = pl.program_id(0), walk.run // walk.chunk
    begin, end = run * walk.run, jnp.minimum((run + 1) * walk.run, spec.length)
    own_first, own_last = first, last = run * per_run, jnp.minimum((run + 1) * per_run, spec.chunks)
    if spec.runs > 1:  # other runs' chunks whose gradient reaches this run's rows
        around = -(-spec.reach // walk.chunk)
        first, last = jnp.maximum(first - around, 0), jnp.minimum(last + around, spec.chunks)

    def keep(text: Array, place: Array, row: Row) -> None:
        at.store(d_x_ref, text, place, row, (begin <= place) & (place < end))

    weights = Weights.load(refs)

    def of_chunk(text: Array, number: Array, carry):
        read, arrived, rows, entering, sums = carry
        chunk = Chunk.of(spec, segments, text, number, *read)

        def ask() -> tuple[Ahead, Arrived, list[Array]]:
            ahead = Ahead.load(at, refs.x, segments, text, number + 1)
            arriving = Arrived.load(at, d_out_refs, slope_refs, text, number + 1)
            place = chunk.start + walk.chunk + spec.reach
            return ahead, arriving, raw_rows(at, d_elsewhere_ref, text, place, walk.chunk)

        own = (own_first <= number) & (number < own_last) if spec.runs > 1 else None
        d_sums = arrived.d_sums(at, chunk)
        rows = rows + widened(entering)
        (rows, sums), (ahead, arriving, following) = _chunk_gradient(at, weights, chunk, d_sums, own, rows, sums, ask)
        for u in range(walk.chunk):  # no later chunk reaches these
            keep(text, chunk.start - spec.reach + u, rows[u])
        return (chunk.window[walk.chunk :], ahead), arriving, rows[walk.chunk :], following, sums

    def of_text(text: Array, sums):
        start = first * walk.chunk - spec.reach
        rows = raw_rows(at, d_elsewhere_ref, text, start, 2 * spec.reach + walk.chunk)
        rows, entering = widened(rows[: 2 * spec.reach]), rows[2 * spec.reach :]
        read = start_reading(at, refs.x, segments, text, first)
        carry = read, Arrived.load(at, d_out_refs, slope_refs, text, first), rows, entering, sums
        _, _, rows, _, sums = lax.fori_loop(first, last, lambda number, carry: of_chunk(text, number, carry), carry)
        for step, row in enumerate(rows):
            keep(text, last * walk.chunk - spec.reach + step, row)
        return sums

    sums = lax.fori_loop(0, walk.texts, of_text, [[at.zero] * (2 * radius + 2) for radius in spec.radii])
    for ref, totals in zip(share_refs, sums, strict=True):
        for tap, total in enumerate(totals):
            ref[tap, :] = total


def widened(rows: list[Array]) -> list[Row]:
    """Rows as they lie in memory, as float32."""
    return [row.astype(jnp.float32) for row in rows]


class Arrived(NamedTuple):
    """A chunk's gradients and gelu's derivatives, for each convolution, as they lie in memory."""

    d_outs: list[list[Array]]
    slopes: list[list[Array] | None]

    @staticmethod
    def load(at: Program, d_out_refs, slope_refs, text: Array, number: Array) -> "Arrived":
        """Those of the chunk of that number, or of the last."""
        spec = at.spec
        number = bounded(jnp.minimum(number, spec.chunks - 1), spec.chunks)

        def rows(ref, count: int, length: int) -> list[Array]:
            places = [number * count + step for step in range(count)]
            places = places if spec.whole_chunks else [jnp.minimum(place, length - 1) for place in places]
            return [at.raw(ref, text, place) for place in places]

        words = spec.walk.chunk // spec.per_word
        slopes = [None if ref is None else rows(ref, words, spec.length_in_words) for ref in slope_refs]
        return Arrived([rows(ref, spec.walk.chunk, spec.length) for ref in d_out_refs], slopes)

    def d_sums(self, at: Program, chunk: Chunk) -> list[list[Row]]:
        """The gradient before gelu, for each convolution and position; zero beyond the end."""
        return [self._d_sum(at, chunk, *each) for each in zip(self.d_outs, self.slopes, strict=True)]

    @staticmethod
    def _d_sum(at: Program, chunk: Chunk, d_out: list[Array], words: list[Array] | None) -> list[Row]:
        rows = widened(d_out)
        if words is not None:
            slopes = [slope for word in words for slope in at.unpacked(word)]
            rows = [row * slope for row, slope in zip(rows, slopes, strict=True)]
        if at.spec.whole_chunks:
            return rows
        return [only(chunk.start + u < at.spec.length, row) for u, row in enumerate(rows)]


def reached(at: Program, seen: Array | None, gradient: Row, pairs: list[tuple[Row, Row]]) -> Row:
    """A row's gradient with what flows to it, if it is seen."""
    if seen is None:
        return at.add_products(gradient, pairs)
    return gradient + only(seen, at.add_products(at.zero, pairs))


def _chunk_gradient(
    at: Program, weights: Weights, chunk: Chunk, d_sums: list[list[Row]], own: Array | None, rows, sums, ask
):
    """Adds a chunk's gradient to that of the rows it reaches and, if its run owns it, to the sums of taps and bias.

    Beside these comes what `ask` reads.
    """
    spec = at.spec
    sums = [
        [*taps, sum(rows if own is None else [only(own, row) for row in rows], bias)]
        for (*taps, bias), rows in zip(sums, d_sums, strict=True)
    ]

    def of_segment(sees: Conditions, owns: Conditions, carry):
        rows, sums = carry
        seen = [only(both(there, own), row) for there, row in zip(sees, chunk.window, strict=True)]
        to_rows: list[list[tuple[Row, Row]]] = [[] for _ in rows]
        new_sums = []
        for radius, taps, d_sum, (*totals, bias) in zip(spec.radii, weights.taps, d_sums, sums, strict=True):
            mine = [only(there, row) for there, row in zip(owns, d_sum, strict=True)]
            for tap in range(2 * radius + 1):
                first, weight = spec.reach - radius + tap, taps[tap]
                totals[tap] = at.add_products(totals[tap], list(zip(seen[first:], mine, strict=False)))
                for u, row in enumerate(mine):
                    to_rows[first + u].append((weight, row))
            new_sums.append([*totals, bias])
        return [reached(at, *each) for each in zip(sees, rows, to_rows, strict=True)], new_sums

    return chunk.each_segment(spec, of_segment, (rows, sums), ask)
