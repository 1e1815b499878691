"""The two passes of the depthwise-convolution kernel: forward, and the gradient of everything at once.

A program owns a block of channels and walks along a text, a chunk of positions at a time; a thread holds its channel's
window of rows in registers, so that a row is loaded once for all taps of all convolutions. A chunk with tokens of
several segments is convolved once for each of them, the others' rows as zeros.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convattn_jax.kernels import tile

Leaf = Any  # an array; in a kernel its reference; in a call of Pallas its block
Row = Array  # a value for each channel of the block, float32
Index = Array | int


@dataclasses.dataclass(frozen=True)
class Walk:
    """Channels of a program, its warps, positions of a chunk and of a program, texts (rows) of a program."""

    channels: int
    warps: int
    chunk: int
    run: int
    texts: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a pass; a radius and whether gelu follows, for each convolution."""

    length: int
    channels: int
    radii: tuple[int, ...]
    activations: tuple[bool, ...]
    walk: Walk
    interpret: bool

    @property
    def reach(self) -> int:
        """The widest radius."""
        return max(self.radii)

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.walk.channels)

    @property
    def chunks(self) -> int:
        """Chunks of a text."""
        return -(-self.length // self.walk.chunk)

    @property
    def runs(self) -> int:
        """Runs of a text."""
        return -(-self.length // self.walk.run)

    @property
    def whole_chunks(self) -> bool:
        """Whether no chunk goes beyond the end."""
        return self.length % self.walk.chunk == 0


class Segments(NamedTuple):
    """Which segment each position belongs to, as one pass reads it; N chunks of U positions, n the widest radius."""

    queries: Leaf  # (B, N U) int32
    keys: Leaf  # (B, N U + 2n) int32, from position -n on; negative where nobody reaches
    distinct: Leaf  # (B, N U) int32: the distinct segments of each chunk's queries, as many as `counts` says
    counts: Leaf  # (B, N) int32


class Operands(NamedTuple):
    """What both passes read; in the calls D of taps and biases is rounded up to whole blocks of channels."""

    x: Leaf  # (B, T, D)
    taps: tuple[Leaf, ...]  # (W, D) float32
    biases: tuple[Leaf, ...]  # (1, D) float32


# --- inside a program ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """What every part of a kernel's body needs: the spec, and which channels of the block exist (None: all)."""

    spec: Spec
    exists: Array | None

    @staticmethod
    def of(spec: Spec) -> "Program":
        """The running program."""
        size = spec.walk.channels
        if spec.channels % size == 0:
            return Program(spec, None)
        return Program(spec, pl.program_id(1) * size + lax.iota(jnp.int32, size) < spec.channels)

    @property
    def zero(self) -> Row:
        """A row of zeros."""
        return jnp.zeros((self.spec.walk.channels,), jnp.float32)

    def load(self, ref, text: Array, place: Array) -> Row:
        """The row of a position."""
        row = ref.at[text, place, pl.ds(0, self.spec.walk.channels)]
        return (row[...] if self.exists is None else plgpu.load(row, mask=self.exists, other=0)).astype(jnp.float32)

    def store(self, ref, text: Array, place: Array, row: Row, where: Array | None) -> None:
        """Writes the row of a position, if `where` holds."""
        mask = self.exists
        if where is not None:
            where = jnp.broadcast_to(where, row.shape)
            mask = where if mask is None else where & mask
        plgpu.store(ref.at[text, place, pl.ds(0, row.shape[0])], row.astype(ref.dtype), mask=mask)

    def fma(self, a: Row, b: Row, c: Row) -> Row:
        """a * b + c, rounded once."""
        return a * b + c if self.spec.interpret else tile.instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c)

    def add_products(self, total: Row, pairs: list[tuple[Row, Row]]) -> Row:
        """total + the sum of a * b over the pairs, in their order, each step rounded once.

        On the machine one block of instructions: the compiler takes minutes over hundreds of separate operations.
        """
        if self.spec.interpret:
            return functools.reduce(lambda total, pair: total + pair[0] * pair[1], pairs, total)
        args = [total, *(row for pair in pairs for row in pair)]
        lines = ["mov.f32 $0, $1;", *(f"fma.rn.f32 $0, ${2 * i + 2}, ${2 * i + 3}, $0;" for i in range(len(pairs)))]
        return tile.instruction("\n".join(lines), *args)

    def gelu(self, x: Row) -> tuple[Row, Row]:
        """x Phi(x) and its derivative Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi), Phi within 8e-8."""
        constant = functools.partial(jnp.full_like, x)
        bell, t = x * (x * (-0.5 * tile.LOG2E)), self.fma(jnp.abs(x), constant(ERFC_SCALE * 0.5**0.5), constant(1.0))
        if self.spec.interpret:
            bell, t = jnp.exp2(bell), 1 / t
        else:
            bell = tile.instruction("ex2.approx.ftz.f32 $0, $1;", bell)
            t = tile.instruction("rcp.approx.ftz.f32 $0, $1;", t)
        polynomial, *coefficients = (constant(0.5 * coefficient) for coefficient in ERFC)
        for coefficient in coefficients:
            polynomial = self.fma(polynomial, t, coefficient)
        tail = polynomial * (t * bell)
        below = jnp.where(x < 0, tail, 1 - tail)
        return x * below, self.fma(x * (2 * math.pi) ** -0.5, bell, below)


ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # Abramowitz & Stegun 1964, 7.1.26
ERFC_SCALE = 0.3275911


def _only(condition: Array, row: Row) -> Row:
    return jnp.where(condition, row, jnp.zeros_like(row))


class Chunk(NamedTuple):
    """The rows of a chunk's positions and of `reach` more on either side, and whose they are."""

    text: Array
    start: Array
    window: list[Row]  # beyond the ends, any row there is
    keys: list[Array]  # the segment of each row of the window
    queries: list[Array]  # the segment of each position
    distinct: Leaf
    several: Array  # how many those are

    def segment(self, g: Array) -> Array:
        """The g-th of the chunk's distinct segments."""
        return self.distinct[self.text, self.start + g]


def load_chunk(at: Program, x_ref, segments: Segments, text: Array, number: Array) -> Chunk:
    """The chunk of that number."""
    spec, size = at.spec, at.spec.walk.chunk
    start, steps = number * size, range(size + 2 * spec.reach)
    places = [jnp.clip(start + step - spec.reach, 0, spec.length - 1) for step in steps]
    return Chunk(
        text,
        start,
        window=[at.load(x_ref, text, place) for place in places],
        keys=[segments.keys[text, start + step] for step in steps],
        queries=[segments.queries[text, start + step] for step in range(size)],
        distinct=segments.distinct,
        several=segments.counts[text, number],
    )


def convolved(at: Program, refs: Operands, chunk: Chunk) -> list[list[Row]]:
    """For each convolution, its value at each position of the chunk, the bias included."""
    spec, size = at.spec, at.spec.walk.chunk
    biases = [bias[0, :] for bias in refs.biases]

    def of_segment(g: Array, sums: list[list[Row]]) -> list[list[Row]]:
        segment = chunk.segment(g)
        seen = [_only(key == segment, row) for key, row in zip(chunk.keys, chunk.window, strict=True)]
        mine = [query == segment for query in chunk.queries]
        results = []
        for radius, taps, bias, before in zip(spec.radii, refs.taps, biases, sums, strict=True):
            rows, weights = seen[spec.reach - radius :], [taps[tap, :] for tap in range(2 * radius + 1)]
            totals = [at.add_products(bias, list(zip(rows[u:], weights, strict=False))) for u in range(size)]
            results.append([jnp.where(m, new, old) for m, new, old in zip(mine, totals, before, strict=True)])
        return results

    return lax.fori_loop(0, chunk.several, of_segment, [[bias] * size for bias in biases])


# --- calls -----------------------------------------------------------------------------------------------------------


def _specs(spec: Spec, operands: Operands, segments: Segments) -> tuple[Any, Operands, Segments]:
    """The blocks of rows (B, T, D), of the operands and of the segments."""
    walk = spec.walk
    rows = pl.BlockSpec((walk.texts, spec.length, walk.channels), lambda n, d, b: (b, 0, d))
    taps, biases = jax.tree.map(
        lambda array: pl.BlockSpec((array.shape[0], walk.channels), lambda n, d, b: (0, d)), operands[1:]
    )
    by_text = jax.tree.map(lambda array: pl.BlockSpec((walk.texts, array.shape[1]), lambda n, d, b: (b, 0)), segments)
    return rows, Operands(rows, taps, biases), by_text


def _whole_blocks(spec: Spec, operands: Operands) -> Operands:
    more = ((0, 0), (0, spec.blocks * spec.walk.channels - spec.channels))
    return Operands(operands.x, *jax.tree.map(lambda array: jnp.pad(array, more), operands[1:]))


def _call(spec: Spec, kernel, name: str, inputs, in_specs, out_specs, out_shape):
    walk, batch = spec.walk, inputs[0].x.shape[0]
    return pl.pallas_call(
        lambda *refs: kernel(Program.of(spec), *refs),
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
    """Each convolution of x, with its bias and gelu, and gelu's derivative if it is wanted; in the type of x."""
    operands, like = _whole_blocks(spec, operands), jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype)
    rows, *specs = _specs(spec, operands, segments)
    slopes = [activation and differentiated for activation in spec.activations]
    return _call(
        spec,
        _forward_kernel,
        "depthwise_forward",
        (operands, segments),
        specs,
        ((rows,) * len(slopes), tuple(rows if wanted else None for wanted in slopes)),
        ((like,) * len(slopes), tuple(like if wanted else None for wanted in slopes)),
    )


def _forward_kernel(at: Program, refs: Operands, segments: Segments, out_refs, slope_refs) -> None:
    spec, walk = at.spec, at.spec.walk
    first = pl.program_id(0) * (walk.run // walk.chunk)
    last = jnp.minimum(first + walk.run // walk.chunk, spec.chunks)

    def of_chunk(text: Array, number: Array) -> None:
        chunk = load_chunk(at, refs.x, segments, text, number)
        sums = convolved(at, refs, chunk)
        for out_ref, slope_ref, activation, totals in zip(out_refs, slope_refs, spec.activations, sums, strict=True):
            for u, total in enumerate(totals):
                value, slope = at.gelu(total) if activation else (total, total)
                place = chunk.start + u
                inside = None if spec.whole_chunks else place < spec.length
                at.store(out_ref, text, place, value, inside)
                if slope_ref is not None:
                    at.store(slope_ref, text, place, slope, inside)

    def of_text(text: Array, carry: None) -> None:
        lax.fori_loop(first, last, lambda number, carry: of_chunk(text, number), None)

    lax.fori_loop(0, walk.texts, of_text, None)


def backward(
    spec: Spec,
    operands: Operands,
    segments: Segments,
    slopes: tuple[Array | None, ...],
    d_outs: tuple[Array, ...],
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """Gradients of x, in its type, and of taps and biases, in float32.

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
        (operands, segments, slopes, d_outs),
        [*specs, tuple(None if slope is None else rows for slope in slopes), (rows,) * len(heights)],
        (rows, tuple(share_specs)),
        (
            jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype),
            tuple(tile.shape(*share, height, spec.blocks * size) for height in heights),
        ),
    )
    sums = [jnp.sum(part, axis=(0, 1))[:, : spec.channels] for part in shares]
    return d_x, tuple(part[:-1] for part in sums), tuple(part[-1:] for part in sums)


def _backward_kernel(
    at: Program, refs: Operands, segments: Segments, slope_refs, d_out_refs, d_x_ref, share_refs
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

    def of_chunk(text: Array, number: Array, carry):
        rows, sums = carry
        chunk = load_chunk(at, refs.x, segments, text, number)
        d_sums = [_d_sums(at, chunk, *refs) for refs in zip(d_out_refs, slope_refs, strict=True)]
        own = (own_first <= number) & (number < own_last) if spec.runs > 1 else None
        rows, sums = _chunk_gradient(at, refs, chunk, d_sums, own, rows + [at.zero] * walk.chunk, sums)
        for u in range(walk.chunk):  # no later chunk reaches these
            keep(text, chunk.start - spec.reach + u, rows[u])
        return rows[walk.chunk :], sums

    def of_text(text: Array, sums):
        carry = [at.zero] * (2 * spec.reach), sums
        rows, sums = lax.fori_loop(first, last, lambda number, carry: of_chunk(text, number, carry), carry)
        for step, row in enumerate(rows):
            keep(text, last * walk.chunk - spec.reach + step, row)
        return sums

    sums = lax.fori_loop(0, walk.texts, of_text, [[at.zero] * (2 * radius + 2) for radius in spec.radii])
    for ref, totals in zip(share_refs, sums, strict=True):
        for tap, total in enumerate(totals):
            ref[tap, :] = total


def _d_sums(at: Program, chunk: Chunk, d_out_ref, slope_ref) -> list[Row]:
    """The gradient before gelu, for each position of the chunk; zero beyond the end."""
    rows, spec = [], at.spec
    for u in range(spec.walk.chunk):
        place = chunk.start + u
        inside = jnp.minimum(place, spec.length - 1)
        row = at.load(d_out_ref, chunk.text, inside)
        if slope_ref is not None:
            row *= at.load(slope_ref, chunk.text, inside)
        rows.append(row if spec.whole_chunks else _only(place < spec.length, row))
    return rows


def _chunk_gradient(at: Program, refs: Operands, chunk: Chunk, d_sums: list[list[Row]], own: Array | None, rows, sums):
    """Adds a chunk's gradient to that of the rows it reaches and, if its run owns it, to the sums of taps and bias."""
    spec = at.spec
    sums = [
        [*taps, sum(rows if own is None else [_only(own, row) for row in rows], bias)]
        for (*taps, bias), rows in zip(sums, d_sums, strict=True)
    ]

    def of_segment(g: Array, carry):
        rows, sums = carry
        segment = chunk.segment(g)
        same = [key == segment for key in chunk.keys]
        seen = [_only(s if own is None else s & own, row) for s, row in zip(same, chunk.window, strict=True)]
        to_rows: list[list[tuple[Row, Row]]] = [[] for _ in rows]
        new_sums = []
        for radius, taps, d_sum, (*totals, bias) in zip(spec.radii, refs.taps, d_sums, sums, strict=True):
            mine = [_only(query == segment, row) for query, row in zip(chunk.queries, d_sum, strict=True)]
            for tap in range(2 * radius + 1):
                first, weight = spec.reach - radius + tap, taps[tap, :]
                totals[tap] = at.add_products(totals[tap], list(zip(seen[first:], mine, strict=False)))
                for u, row in enumerate(mine):
                    to_rows[first + u].append((weight, row))
            new_sums.append([*totals, bias])
        added = [at.add_products(at.zero, pairs) for pairs in to_rows]
        return [old + _only(s, new) for s, old, new in zip(same, rows, added, strict=True)], new_sums

    return lax.fori_loop(0, chunk.several, of_segment, (rows, sums))
