"""What the depthwise-convolution kernel does within a program: rows of channels, chunks of positions, gelu.

Everything below `Operands` runs inside a Pallas kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convattn_jax.kernels import tile
from convattn_jax.kernels.blocks import power_of_two
from convattn_jax.model.layers import ERFC, ERFC_SCALE

# Convolutions that gelu follows are computed times GELU_SCALE, so that exp(-z^2 / 2) = 2^(-(GELU_SCALE z)^2).
GELU_SCALE = (0.5 * math.log2(math.e)) ** 0.5
BELL_SHIFT = math.log2((2 * math.pi) ** -0.5 / GELU_SCALE**2)
TAIL_SCALE = 0.5 * GELU_SCALE * (2 * math.pi) ** 0.5
HALF_ERFC = (0.47047, 0.7478556, -0.0958798, 0.3480242)  # Abramowitz & Stegun 1964, 7.1.25, the scale in front

Leaf = Any  # an array; in a kernel its reference; in a call of Pallas its block
Row = Array  # a value for each channel of the block, float32
Conditions = Sequence[Array | None]  # scalars; None holds


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
    half: bool  # rows are bfloat16
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
    def words(self) -> int:
        """32-bit words for the rows of a chunk's window."""
        return -(-(self.walk.chunk + 2 * self.reach) // 32)

    @property
    def per_word(self) -> int:
        """Positions whose slopes share a 32-bit word."""
        return 2 if self.half else 1

    @property
    def length_in_words(self) -> int:
        """Words of a text's slopes."""
        return -(-self.length // self.per_word)

    @property
    def whole_chunks(self) -> bool:
        """Whether no chunk goes beyond the end."""
        return self.length % self.walk.chunk == 0


class Segments(NamedTuple):
    """Who belongs together, as one pass reads it: for each chunk, once for each distinct segment of its positions.

    N chunks of U positions; n the widest radius; M words hold a bit for each of the U + 2n rows of a chunk's window.
    """

    sees: Leaf  # (B, N U M) int32: which rows of the window belong to the segment
    owns: Leaf  # (B, N U) int32: which positions of the chunk do
    counts: Leaf  # (B, N) int32: how many segments those are; the rest of the U has no bit set


class Operands(NamedTuple):
    """What both passes read; in the calls D of taps and biases is rounded up to whole blocks of channels."""

    x: Leaf  # (B, T, D)
    taps: tuple[Leaf, ...]  # (W, D) float32
    biases: tuple[Leaf, ...]  # (1, D) float32


# --- inside a program ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """What every part of a kernel's body needs: the spec, where the program begins, which channels exist."""

    spec: Spec
    text: Array
    channel: Array
    exists: Array | None  # None: all

    @staticmethod
    def of(spec: Spec, batch: int) -> "Program":
        """The running program."""
        size = spec.walk.channels
        text = bounded(pl.program_id(2), batch // spec.walk.texts) * spec.walk.texts
        channel = bounded(pl.program_id(1), spec.blocks) * size
        exists = None if spec.channels % size == 0 else channel + lax.iota(jnp.int32, size) < spec.channels
        return Program(spec, text, channel, exists)

    @property
    def zero(self) -> Row:
        """A row of zeros."""
        return jnp.zeros((self.spec.walk.channels,), jnp.float32)

    def block(self, ref, text: Array, place: Array) -> Leaf:
        """The program's channels of a position."""
        text = self.text + bounded(text, self.spec.walk.texts)
        return ref.at[text, place, pl.ds(self.channel, self.spec.walk.channels)]

    def raw(self, ref, text: Array, place: Array) -> Array:
        """The row of a position as it lies in memory."""
        row = self.block(ref, text, place)
        return row[...] if self.exists is None else plgpu.load(row, mask=self.exists, other=0)

    def load(self, ref, text: Array, place: Array) -> Row:
        """The row of a position."""
        return self.raw(ref, text, place).astype(jnp.float32)

    def store(self, ref, text: Array, place: Array, row: Array, where: Array | None) -> None:
        """Writes the row of a position, or a row of words, if `where` holds."""
        mask = self.exists
        if where is not None:
            where = jnp.broadcast_to(where, row.shape)
            mask = where if mask is None else where & mask
        plgpu.store(self.block(ref, text, place), row.astype(ref.dtype), mask=mask)

    def packed(self, rows: Sequence[Row]) -> Array:
        """What `spec.per_word` rows are in memory as words: bfloat16 side by side, the first one lower."""
        if not self.spec.half:
            return rows[0]
        if not self.spec.interpret:
            return tile.instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", *rows, dtype=jnp.int32)
        low, high = (_bits(row.astype(jnp.bfloat16).astype(jnp.float32)) for row in rows)
        return lax.shift_right_logical(low, 16) | high

    def unpacked(self, word: Array) -> list[Row]:
        """The rows of `packed`."""
        if not self.spec.half:
            return [word]
        return [lax.bitcast_convert_type(bits, jnp.float32) for bits in (word << 16, word & np.int32(-1 << 16))]

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
        """gelu(x / GELU_SCALE) and its derivative by x, Phi within 1.3e-5, a hundredth of its rounding, or 8e-8."""
        constant = functools.partial(jnp.full_like, x)
        scale, *coefficients = HALF_ERFC if self.spec.half else (ERFC_SCALE, *ERFC)
        exponent = self.fma(x, x, constant(-BELL_SHIFT))
        t = self.fma(jnp.abs(x), constant(scale * math.log2(math.e) ** -0.5), constant(1.0))
        if self.spec.interpret:
            bell, t = jnp.exp2(-exponent), 1 / t
        else:
            bell = tile.instruction("neg.f32 $0, $1; ex2.approx.ftz.f32 $0, $0;", exponent)
            t = tile.instruction("rcp.approx.ftz.f32 $0, $1;", t)
        polynomial, *coefficients = (constant(TAIL_SCALE * coefficient) for coefficient in coefficients)
        for coefficient in coefficients:
            polynomial = self.fma(polynomial, t, coefficient)
        tail = polynomial * (t * bell)
        below = jnp.where(x < 0, tail, 1 / GELU_SCALE - tail)
        return x * below, self.fma(x, bell, below)


def bounded(value: Array, count: int) -> Array:
    """A number that is less than `count`, so that the compiler knows it: addresses then differ by constants."""
    return value & (power_of_two(count) - 1)


def chosen(condition: Array | None, row: Row, other: Row) -> Row:
    """The row where a scalar condition holds (None: it does), else the other."""
    return row if condition is None else jnp.where(condition, row, other)


def only(condition: Array | None, row: Row) -> Row:
    """The row where a scalar condition holds, else zeros."""
    return chosen(condition, row, jnp.zeros_like(row))


def both(a: Array | None, b: Array | None) -> Array | None:
    """Whether two scalar conditions hold."""
    return b if a is None else a if b is None else a & b


class Weights(NamedTuple):
    """Taps and biases of every convolution, in registers for the whole walk."""

    taps: list[list[Row]]
    biases: list[Row]

    @staticmethod
    def load(refs: Operands) -> "Weights":
        """Those of the program's channels."""
        taps = [[ref[tap, :] for tap in range(ref.shape[0])] for ref in refs.taps]
        return Weights(taps, [ref[0, :] for ref in refs.biases])


class Member(NamedTuple):
    """One of a chunk's segments: the words of its bits."""

    sees: list[Array]
    owns: Array

    @staticmethod
    def load(spec: Spec, segments: Segments, text: Array, number: Array, g: Array | int) -> "Member":
        """The g-th of the chunk of that number; any there is beyond the last."""
        at = number * spec.walk.chunk + jnp.minimum(g, spec.walk.chunk - 1)
        return Member([segments.sees[text, at * spec.words + i] for i in range(spec.words)], segments.owns[text, at])

    def whole(self, rows: int, positions: int) -> Array:
        """Whether every row of the window and every position of the chunk belongs to the segment."""
        words = [(word, min(32, rows - 32 * i)) for i, word in enumerate(self.sees)] + [(self.owns, positions)]
        return functools.reduce(jnp.logical_and, (word == _ones(count) for word, count in words))

    def rows(self, count: int) -> list[Array]:
        """Whether each row of the window belongs to the segment."""
        return [_bit(self.sees[row // 32], row % 32) for row in range(count)]

    def positions(self, count: int) -> list[Array]:
        """Whether each position of the chunk does."""
        return [_bit(self.owns, position) for position in range(count)]


def _ones(count: int) -> np.int32:
    return np.uint32((1 << count) - 1).astype(np.int32)


def _bits(row: Row) -> Array:
    return lax.bitcast_convert_type(row, jnp.int32)


def _bit(word: Array, number: int) -> Array:
    return (word & np.uint32(1 << number).astype(np.int32)) != 0


class Ahead(NamedTuple):
    """What a chunk adds to what the one before it has read: asked for while that one is computed."""

    rows: list[Array]  # as they lie in memory
    member: Member  # its first segment
    several: Array  # how many it has

    @staticmethod
    def load(at: Program, x_ref, segments: Segments, text: Array, number: Array) -> "Ahead":
        """That of the chunk of that number, or of the last."""
        number = jnp.minimum(number, at.spec.chunks - 1)
        rows = raw_rows(at, x_ref, text, number * at.spec.walk.chunk + at.spec.reach, at.spec.walk.chunk)
        return Ahead(rows, Member.load(at.spec, segments, text, number, 0), segments.counts[text, number])


class Chunk(NamedTuple):
    """The rows of a chunk's positions and of `reach` more on either side, and whose they are."""

    text: Array
    number: Array
    start: Array
    words: Array  # the first of its slopes
    window: list[Row]  # beyond the ends, any row there is
    member: Member
    several: Array
    segments: Segments

    @staticmethod
    def of(spec: Spec, segments: Segments, text: Array, number: Array, before: list[Row], ahead: Ahead) -> "Chunk":
        """The chunk of that number; `before`: the 2 `reach` rows that its window shares with the previous one's."""
        window = before + [row.astype(jnp.float32) for row in ahead.rows]
        number = bounded(number, spec.chunks)
        words = number * (spec.walk.chunk // spec.per_word)
        return Chunk(text, number, number * spec.walk.chunk, words, window, ahead.member, ahead.several, segments)

    def each_segment(
        self, spec: Spec, body: Callable[[Conditions, Conditions, Any], Any], carry: Any, ask: Callable[[], Any]
    ) -> tuple[Any, Any]:
        """body(which rows of the window, which positions, carry) for each of the chunk's segments; what `ask` reads.

        Where the whole window is one segment, as nearly everywhere, nothing is tested: None stands for each condition.
        There `ask` reads for the next chunk while this one is computed. (In front of the branch it would not: there the
        compiler copies what it will carry on, and so waits for it.)
        """

        def of_segment(g: Array, carry: Any) -> Any:
            member, carry = carry
            following = Member.load(spec, self.segments, self.text, self.number, g + 1)
            return following, body(member.rows(len(self.window)), member.positions(spec.walk.chunk), carry)

        def whole(carry: Any) -> tuple[Any, Any]:
            asked = ask()
            return body([None] * rows, [None] * positions, carry), asked

        def mixed(carry: Any) -> tuple[Any, Any]:
            member = Member.load(spec, self.segments, self.text, self.number, 0)
            return lax.fori_loop(0, self.several, of_segment, (member, carry))[1], ask()

        rows, positions = len(self.window), spec.walk.chunk
        return lax.cond(self.member.whole(rows, positions), whole, mixed, carry)


def raw_rows(at: Program, x_ref, text: Array, first: Array, count: int) -> list[Array]:
    """Rows of x from a position on, as they lie in memory; beyond the ends, any row there is."""
    spec, size = at.spec, at.spec.walk.chunk
    if spec.whole_chunks and spec.reach % size == 0:
        places = [
            jnp.clip(first + group, 0, spec.length - size) + step
            for group in range(0, count, size)
            for step in range(size)
        ]
    else:
        places = [jnp.clip(first + step, 0, spec.length - 1) for step in range(count)]
    return [at.raw(x_ref, text, place) for place in places]


def convolved(at: Program, weights: Weights, chunk: Chunk, ask: Callable[[], Any]) -> tuple[list[list[Row]], Any]:
    """For each convolution, its value at each position of the chunk, the bias included; and what `ask` reads."""
    spec, size = at.spec, at.spec.walk.chunk

    def of_segment(sees: Conditions, owns: Conditions, sums: list[list[Row]]) -> list[list[Row]]:
        seen = [only(there, row) for there, row in zip(sees, chunk.window, strict=True)]
        results = []
        for radius, taps, bias, before in zip(spec.radii, *weights, sums, strict=True):
            rows = seen[spec.reach - radius :]
            totals = [at.add_products(bias, list(zip(rows[u:], taps, strict=False))) for u in range(size)]
            results.append([chosen(own, new, old) for own, new, old in zip(owns, totals, before, strict=True)])
        return results

    return chunk.each_segment(spec, of_segment, [[bias] * size for bias in weights.biases], ask)
