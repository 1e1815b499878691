"""What the depthwise-convolution kernel does within a program: rows of channels, chunks of positions, gelu.

Everything below `Operands` runs inside a Pallas kernel.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convattn_jax.kernels import tile
from convattn_jax.model.layers import ERFC, ERFC_SCALE

Leaf = Any  # an array; in a kernel its reference; in a call of Pallas its block
Row = Array  # a value for each channel of the block, float32


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


def only(condition: Array, row: Row) -> Row:
    """The row where a scalar condition holds, else zeros."""
    return jnp.where(condition, row, jnp.zeros_like(row))


class Weights(NamedTuple):
    """Taps and biases of every convolution, in registers for the whole walk."""

    taps: list[list[Row]]
    biases: list[Row]

    @staticmethod
    def load(refs: Operands) -> "Weights":
        """Those of the program's channels."""
        taps = [[ref[tap, :] for tap in range(ref.shape[0])] for ref in refs.taps]
        return Weights(taps, [ref[0, :] for ref in refs.biases])


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


def load_rows(at: Program, x_ref, text: Array, first: Array, count: int) -> list[Row]:
    """Rows of x from a position on; beyond the ends, any row there is."""
    places = [jnp.clip(first + step, 0, at.spec.length - 1) for step in range(count)]
    return [at.load(x_ref, text, place) for place in places]


def load_chunk(at: Program, x_ref, segments: Segments, text: Array, number: Array, before: list[Row]) -> Chunk:
    """The chunk of that number; `before`: the 2 `reach` rows that its window shares with the previous one's."""
    spec, size = at.spec, at.spec.walk.chunk
    start = number * size
    return Chunk(
        text,
        start,
        window=before + load_rows(at, x_ref, text, start + spec.reach, size),
        keys=[segments.keys[text, start + step] for step in range(size + 2 * spec.reach)],
        queries=[segments.queries[text, start + step] for step in range(size)],
        distinct=segments.distinct,
        several=segments.counts[text, number],
    )


def convolved(at: Program, weights: Weights, chunk: Chunk) -> list[list[Row]]:
    """For each convolution, its value at each position of the chunk, the bias included."""
    spec, size = at.spec, at.spec.walk.chunk

    def of_segment(g: Array, sums: list[list[Row]]) -> list[list[Row]]:
        segment = chunk.segment(g)
        seen = [only(key == segment, row) for key, row in zip(chunk.keys, chunk.window, strict=True)]
        mine = [query == segment for query in chunk.queries]
        results = []
        for radius, taps, bias, before in zip(spec.radii, *weights, sums, strict=True):
            rows = seen[spec.reach - radius :]
            totals = [at.add_products(bias, list(zip(rows[u:], taps, strict=False))) for u in range(size)]
            results.append([jnp.where(m, new, old) for m, new, old in zip(mine, totals, before, strict=True)])
        return results

    return lax.fori_loop(0, chunk.several, of_segment, [[bias] * size for bias in weights.biases])
