"""What the attention kernels do on one tile of queries and keys: rows, products, masks, dropout, the walk over tiles.

Everything here runs inside a Pallas kernel. Scores are in units of log 2.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convattn_jax.kernels import inputs
from convattn_jax.kernels.blocks import Blocks, Tile, power_of_two
from convattn_jax.model.dropout import keep_product, lowest_kept

LOG2E = math.log2(math.e)
HIDDEN = -math.inf


@dataclasses.dataclass(frozen=True)
class Band(inputs.Band):
    """The taps of one side, their slots handled in chunks."""

    @property
    def chunk(self) -> int:
        """Slots that a product handles at once."""
        return min(64, power_of_two(self.slots))

    @property
    def padded(self) -> int:
        """Slots rounded up to whole chunks."""
        return -(-self.slots // self.chunk) * self.chunk


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a call."""

    length: int
    head_size: int
    content: float  # factor of q_i.k_j; 0 leaves the product out
    query_band: Band | None
    key_band: Band | None
    masked: bool  # segments decide what is visible
    rate: float
    half: bool  # bfloat16 rows
    blocks: Blocks
    interpret: bool

    @property
    def width(self) -> int:
        """Head size as the tiles see it."""
        return power_of_two(self.head_size)

    @property
    def padded(self) -> int:
        """Length of the bookkeeping arrays."""
        return -(-self.length // self.blocks.largest) * self.blocks.largest

    @property
    def one_pass(self) -> bool:
        """Whether one tile holds all queries and keys."""
        return self.blocks.dkv is None

    @property
    def by_keys(self) -> bool:
        """Whether that tile holds all keys and some queries, of which it takes one run after the other."""
        return self.one_pass and self.blocks.dq.queries < self.length

    @property
    def whole_rows(self) -> bool:
        """Whether a tile of the pass by queries holds all keys, and so computes delta from P and dP themselves."""
        return self.blocks.dq.keys >= self.length

    @property
    def radius(self) -> int:
        """Distance from which both bands are constant."""
        return max((band.radius for band in (self.query_band, self.key_band) if band), default=0)


@dataclasses.dataclass(frozen=True)
class Side:
    """A run of positions along one axis of a tile."""

    start: Array | int
    size: int
    axis: int
    given: Array | None = None  # the positions, where they come from elsewhere

    @property
    def ids(self) -> Array:
        """The positions, (size,)."""
        if self.given is not None:
            return self.given
        return self.start + lax.broadcasted_iota(jnp.int32, (self.size,), 0)

    @property
    def grid(self) -> Array:
        """The positions along their axis of the tile."""
        return self.spread(self.ids)

    def spread(self, vector: Array) -> Array:
        """A value per position, along the axis of the tile."""
        return vector[:, None] if self.axis == 0 else vector[None, :]

    def total(self, tile: Array) -> Array:
        """Sums a tile over the other axis: a value per position."""
        return jnp.sum(tile, axis=1 - self.axis)


# --- rows of (length, head size) -------------------------------------------------------------------------------------


def _present(spec: Spec, side: Side) -> Array | None:
    rows = None if spec.length % side.size == 0 else (side.ids < spec.length)[:, None]
    columns = None if spec.width == spec.head_size else (lax.iota(jnp.int32, spec.width) < spec.head_size)[None, :]
    if rows is None or columns is None:
        present = rows if columns is None else columns
        return None if present is None else jnp.broadcast_to(present, (side.size, spec.width))
    return rows & columns


def load_rows(spec: Spec, ref, side: Side, part: int | None = None) -> Array:
    """The rows of a side, zeros beyond the end."""
    tokens, channels = pl.ds(side.start, side.size), pl.ds(0, spec.width)
    rows = ref.at[tokens, channels] if part is None else ref.at[tokens, np.int32(part), channels]
    present = _present(spec, side)
    return rows[...] if present is None else plgpu.load(rows, mask=present, other=0)


def store_rows(spec: Spec, ref, side: Side, value: Array, part: int | None = None) -> None:
    """Writes the rows of a side in the array's dtype, as a part of it where it holds several."""
    tokens, channels = pl.ds(side.start, side.size), pl.ds(0, spec.width)
    rows = ref.at[tokens, channels] if part is None else ref.at[tokens, np.int32(part), channels]
    plgpu.store(rows, value.astype(ref.dtype), mask=_present(spec, side))


# --- products --------------------------------------------------------------------------------------------------------


def dot(spec: Spec, a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """a times b over the given axes, summed in float32; float32 operands are never rounded to tf32."""
    if spec.interpret:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _split(x: Array) -> tuple[Array, Array]:
    """float32 as a sum of two bfloat16, to 2**-17."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def tap_dot(spec: Spec, x: Array, taps: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """x times float32 taps; where x is bfloat16 the taps go in as two bfloat16 each."""
    if x.dtype == jnp.float32:
        return dot(spec, x, taps, contract)
    high, low = _split(taps)
    return dot(spec, x, low, contract) + dot(spec, x, high, contract)


def wide_dot(spec: Spec, onto: Array, a: Array, b: Array, contract: tuple[int, int], narrow: bool) -> Array:
    """`onto` and a product of two float32 arrays; `narrow` does it by three bfloat16 products, to 2**-16."""
    if not narrow:
        return onto + dot(spec, a, b, contract)
    (a, a_low), (b, b_low) = _split(a), _split(b)
    return ((onto + dot(spec, a_low, b, contract)) + dot(spec, a, b_low, contract)) + dot(spec, a, b, contract)


# --- arithmetic that the compiler would not fuse ---------------------------------------------------------------------


def exp2(spec: Spec, x: Array) -> Array:
    """2**x by one instruction, which flushes denormal results to 0."""
    return jnp.exp2(x) if spec.interpret else instruction("ex2.approx.ftz.f32 $0, $1;", x)


def fma(spec: Spec, a: Array, b: Array | float, c: Array | float) -> Array:
    """a * b + c rounded once; b and c broadcast to a. XLA lets Triton fuse no product with a sum."""
    b, c = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), a.shape) for x in (b, c))
    return a * b + c if spec.interpret else instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def again(spec: Spec, side: "Side") -> "Side":
    """The same side, as the compiler can't know: it computes anew what depends on the positions.

    Otherwise it keeps the comparisons of a tile from the scores to the gradient, a bit an element, and packing and
    taking apart these bits costs three to four times what comparing again does.
    """
    if spec.interpret:
        return side
    ids = plgpu.elementwise_inline_asm(
        "mov.b32 $0, $1;",
        args=[side.ids],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((side.size,), jnp.int32)],
    )[0]
    return dataclasses.replace(side, given=ids)


def instruction(asm: str, *args: Array, dtype=jnp.float32) -> Array:
    """Instructions of the machine on each element, $0 the result, of 32 bits; not for the interpreter."""
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    constraints = ",".join(
        ["=&f" if dtype == jnp.float32 else "=&r", *("f" if x.dtype == jnp.float32 else "r" for x in args)]
    )
    return plgpu.elementwise_inline_asm(asm, args=args, constraints=constraints, pack=1, result_shape_dtypes=[result])[
        0
    ]


# --- masks and dropout -----------------------------------------------------------------------------------------------


def hide(spec: Spec, scores: Array, i: Side, j: Side, query_segments: Array | None, key_segments_ref) -> Array:
    """Scores with minus infinity where query i doesn't see key j."""
    if query_segments is not None:
        keys = j.spread(key_segments_ref[pl.ds(j.start, j.size)])
        return jnp.where(i.spread(query_segments) == keys, scores, HIDDEN)
    return scores if spec.length % j.size == 0 else jnp.where(j.grid < spec.length, scores, HIDDEN)


def drop(spec: Spec, i: Side, j: Side, factors: tuple, tile: Array) -> Array:
    """Zeros where attention dropout strikes: bit by bit `convattn_jax.model.dropout.keep_pairs`."""
    # Read here, once a tile: known any earlier, the compiler draws before the products and keeps the bits, packed.
    of_query, of_key = (
        jnp.broadcast_to(side.spread(ref[pl.ds(side.start, side.size)]), tile.shape)
        for ref, side in zip(factors, (i, j), strict=True)
    )
    if spec.interpret:
        return jnp.where(keep_product(of_query, of_key, spec.rate), tile, 0.0)
    # As one block: XLA would round to bfloat16 first, and take pairs of numbers apart to select.
    draw = f"mul.lo.u32 draw, $2, $3; setp.ge.u32 kept, draw, {lowest_kept(spec.rate)};"
    asm = f"{{ .reg .u32 draw; .reg .pred kept; {draw} selp.f32 $0, $1, 0f00000000, kept; }}"
    return instruction(asm, tile, of_query, of_key)


# --- a walk over the tiles of the other side -------------------------------------------------------------------------


def walk(spec: Spec, side: Side, size: int, body, carry):
    """body(start, zone, carry) for every tile of `size` positions; zone -1, 0, 1: the tile is below, on, above."""
    count = -(-spec.length // size)
    if count == 1:
        return body(0, 0, carry)
    if spec.query_band is None and spec.key_band is None:
        return lax.fori_loop(0, count, lambda tile, carry: body(tile * size, 1, carry), carry)
    if isinstance(side.start, int):
        below = min(max(side.start - spec.radius + 1, 0) // size, count)
        above = min(-(-(side.start + side.size - 1 + spec.radius) // size), count)
    else:
        below = jnp.minimum(lax.div(jnp.maximum(side.start - spec.radius + 1, 0), size), count)
        above = jnp.minimum(lax.div(side.start + side.size - 1 + spec.radius + size - 1, size), count)
    bounds = (0, below, above, count)
    for zone in (-1, 0, 1):
        first, last = bounds[zone + 1], bounds[zone + 2]
        if not (isinstance(first, int) and isinstance(last, int) and first >= last):
            carry = lax.fori_loop(first, last, lambda tile, carry, zone=zone: body(tile * size, zone, carry), carry)
    return carry


def barrier(spec: Spec) -> None:
    """What the program's threads have written, all of them read after this."""
    if not spec.interpret:
        plgpu.debug_barrier()


def compiler_params(tile: Tile) -> plgpu.CompilerParams:
    """Warps and pipeline depth, for the Triton route of Pallas."""
    return plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """A float32 output unless said otherwise."""
    return jax.ShapeDtypeStruct(sizes, dtype)
