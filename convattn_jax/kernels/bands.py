"""Bands of taps: what clipped taps add to the scores of a tile, and what flows back, without an array of T x T.

A tap at c(j-i), clipped to [-n, n], gives row i of the scores one value for j <= i-n, 2n-1 values on a band, and one
value for j >= i+n. So a *band* stores per token only its slots; slot s stands at distance s-n, slot 0 for everything
further below, slot 2n (kept only where softmax doesn't cancel it) for everything further above. A tile far from the
diagonal adds one number per token; one on the diagonal gathers slots owner * slots + (other - owner) + n, and in the
backward pass scatters there: every slot receives one element, so a store suffices.

The owner is the query for taps at c(j-i), the key for taps at c(i-j). Everything here runs inside a Pallas kernel.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convattn_jax.kernels.blocks import power_of_two
from convattn_jax.kernels.tile import LOG2E, Band, Side, Spec, again, barrier, fma, tap_dot, wide_dot


def slot(band: Band, ref, owner: Side, number: int) -> Array:
    """One slot of every owner."""
    return plgpu.load(ref.at[owner.ids * band.slots + number])


NOWHERE = -(1 << 30)


class Strip:
    """Where a tile meets a band: every owner's part of the band, in a narrow array gathered or scattered at once.

    At most 2n-1 neighbouring positions are on an owner's band, so with a width of a power of two from there on, one
    column per remainder holds them all: strip[owner, m] stands for the position congruent m that lies on the band. The
    tile seen as (owner, group, m) compares its positions with those, broadcast over the groups.
    """

    def __init__(self, band: Band, owner: Side, other: Side):
        self.band, self.owner, self.other = band, owner, other
        self.width = min(power_of_two(2 * band.radius - 1), other.size)
        groups = other.size // self.width
        self.axis = 1 - owner.axis  # of the groups
        self.tile = (owner.size, other.size) if owner.axis == 0 else (other.size, owner.size)
        self.shape = (owner.size, groups, self.width) if owner.axis == 0 else (groups, self.width, owner.size)

    def _partner(self, owner: Array, member: Array) -> Array:
        """The position that each element stands for, and NOWHERE where the band holds none."""
        first = owner - (self.band.radius - 1)
        if self.width == self.other.size:
            partner = jnp.broadcast_to(self.other.start + member, jnp.broadcast_shapes(owner.shape, member.shape))
        else:
            partner = first + ((member - first) & (self.width - 1))
        return jnp.where((partner >= first) & (partner < owner + self.band.radius), partner, NOWHERE)

    def _places(self) -> tuple[Array, Array]:
        """Partners and slots, (width, owner): Triton lays threads along the first axis, neighbours in memory."""
        owner, member = self.owner.ids[None, :], lax.broadcasted_iota(jnp.int32, (self.width,), 0)[:, None]
        partner = self._partner(owner, member)
        return partner, owner * (self.band.slots - 1) + (partner + self.band.radius)

    def _turned(self, strip: Array) -> Array:
        """Between (width, owner) and the axes of the tile."""
        return strip.T if self.owner.axis == 0 else strip

    def read(self, ref) -> Array:
        """The band's values."""
        partner, index = self._places()
        return self._turned(plgpu.load(ref.at[index], mask=partner > NOWHERE, other=0.0))

    def write(self, spec: Spec, ref, gradient: Array) -> None:
        """Stores the elements of a tile that lie on the band."""
        hit = self._hit(again(spec, self.owner))
        strip = jnp.sum(jnp.where(hit, gradient.reshape(self.shape), 0.0), axis=self.axis)
        partner, index = self._places()
        inside = (partner >= self.other.start) & (partner < self.other.start + self.other.size)
        index = jnp.where(inside, index, ref.shape[0]) if spec.interpret else index  # it scatters masked ones too
        plgpu.store(ref.at[index], self._turned(strip), mask=inside)

    def spread(self, strip: Array, rest: Array) -> Array:
        """The tile with the strip on the band and `rest`, broadcast, elsewhere."""
        rest = jnp.broadcast_to(rest, self.tile).reshape(self.shape)
        strip = jnp.broadcast_to(jnp.expand_dims(strip, self.axis), self.shape)
        return jnp.where(self._hit(self.owner), strip, rest).reshape(self.tile)

    def _hit(self, owner: Side) -> Array:
        if owner.axis == 1:  # a thread has half as many partners as elements there, which makes distances cheaper
            step = jnp.broadcast_to(self.other.grid - owner.grid + (self.band.radius - 1), self.tile)
            return (step.astype(jnp.uint32) < 2 * self.band.radius - 1).reshape(self.shape)
        position = jnp.broadcast_to(self.other.grid, self.tile).reshape(self.shape)
        member = lax.broadcasted_iota(jnp.int32, (self.width,), 0)
        partner = self._partner(owner.grid, member[None, :])
        return position == jnp.broadcast_to(jnp.expand_dims(partner, self.axis), self.shape)


@dataclasses.dataclass(frozen=True)
class BandTile:
    """What a band adds to the scores of one tile: read before the products, added after them."""

    below: Array | None  # slot 0 of every owner
    above: Array | None  # slot 2n
    strip: Strip | None
    values: Array | None

    def bias(self, owner: Side, other: Side, radius: int, start: Array | None) -> Array | None:
        """The band, on top of a number per owner; broadcasts to the tile, None for nothing."""
        zeros = jnp.zeros((owner.size,), jnp.float32)
        base = owner.spread(zeros if start is None else start)
        below, above = (None if x is None else owner.spread(x) + base for x in (self.below, self.above))
        if self.strip is None or self.values is None or below is None:
            far = above if below is None else below
            return base if far is None and start is not None else far
        rest = jnp.where(other.grid <= owner.grid - radius, below, base)
        if above is not None:
            rest = jnp.where(other.grid >= owner.grid + radius, above, rest)
        return self.strip.spread(self.values + base, rest)


def read_band(band: Band, ref, owner: Side, other: Side, zone: int, below: Array | None = None) -> BandTile:
    """zone -1, 0, 1: the tile lies below, on or above the band, seen from the owner; `below`: slot 0, where at hand."""
    if zone <= 0 and below is None:
        below = slot(band, ref, owner, 0)
    above = slot(band, ref, owner, 2 * band.radius) if zone >= 0 and band.above else None
    strip = Strip(band, owner, other) if zone == 0 else None
    return BandTile(below if zone <= 0 else None, above, strip, strip.read(ref) if strip else None)


def band_gradient(
    spec: Spec, band: Band, ref, owner: Side, other: Side, gradient: Array, zone: int
) -> tuple[Array, Array]:
    """Stores a tile's elements on the band; returns its sums for slots 0 and 2n."""
    none = jnp.zeros((owner.size,), jnp.float32)
    if zone:
        return (owner.total(gradient), none) if zone < 0 else (none, owner.total(gradient) if band.above else none)
    Strip(band, owner, other).write(spec, ref, gradient)
    grid = again(spec, owner).grid
    below = owner.total(jnp.where(other.grid <= grid - band.radius, gradient, 0.0))
    if not band.above:
        return below, none
    return below, owner.total(jnp.where(other.grid >= grid + band.radius, gradient, 0.0))


def _folded(band: Band, owners: int, others: int) -> int:
    return min(max(64, power_of_two(owners + 2 * band.radius - 2)), others)


def folds(band: Band, owners: int, others: int) -> bool:
    """Whether `scatter` folds its tile, and so writes every slot of its owners but slot 0."""
    return _folded(band, owners, others) < others


def parts(keys: int) -> int:
    """Summands that a query's slot 0 comes in: one of each of four warps, so that none waits for another."""
    return min(4, keys // 16)


def scatter(spec: Spec, band: Band, ref, below_ref, owner: Side, other: Side, gradient: Array) -> None:
    """Stores a tile's elements on the band, and its sums below as some summands; it holds every position of others.

    At most owner.size + 2n - 2 neighbouring positions are on the band of any owner, so the tile is folded to as many
    rows: fewer elements to compare and to bring into the order of memory.
    """
    owner = again(spec, owner)
    below = jnp.where(other.grid <= owner.grid - band.radius, gradient, 0.0)
    summands = parts(other.size)
    below = below.reshape(other.size // 16 // summands, summands, 16, owner.size)  # of a thread, by warps, of a warp
    below = jnp.sum(jnp.sum(below, axis=0), axis=1)
    first = lax.broadcasted_iota(jnp.int32, below.shape, 0) * (below_ref.shape[0] // summands)
    plgpu.store(below_ref.at[first + owner.ids[None, :]], below)

    strip, position = gradient, other.ids
    width = _folded(band, owner.size, other.size)
    if width < other.size:
        first = owner.start - (band.radius - 1)
        near = (other.ids - first).astype(jnp.uint32) < owner.size + 2 * band.radius - 2
        strip = jnp.where(near[:, None], gradient, 0.0).reshape(other.size // width, width, owner.size)
        strip, position = jnp.sum(strip, axis=0), first + ((lax.iota(jnp.int32, width) - first) & (width - 1))
    position = position[:, None]
    inside = (position - owner.grid + (band.radius - 1)).astype(jnp.uint32) < 2 * band.radius - 1
    index = owner.grid * (band.slots - 1) + band.radius + position
    index = jnp.where(inside, index, ref.shape[0]) if spec.interpret else index  # it scatters masked ones too
    plgpu.store(ref.at[index], strip, mask=inside)


def project_band(spec: Spec, band: Band, x: Array, taps_ref, beta_ref, ref, owner: Side) -> None:
    """Writes the slots of every owner: (x . taps + beta) / log 2."""

    def chunk(number, _):
        first = number * band.chunk
        values = jnp.zeros((owner.size, band.chunk), jnp.float32)
        if taps_ref is not None:
            values += tap_dot(spec, x, taps_ref[pl.ds(0, spec.width), pl.ds(first, band.chunk)])
        if beta_ref is not None:
            values += beta_ref[pl.ds(first, band.chunk)][None, :]
        index, inside = _slots(band, owner, first)
        if spec.interpret:
            index = jnp.where(inside, index, ref.shape[0])
        plgpu.store(ref.at[index], values * LOG2E, mask=inside if band.slots % band.chunk else None)
        return _

    _over_chunks(band, chunk, 0)


def _slots(band: Band, owner: Side, first: Array | int) -> tuple[Array, Array]:
    number = first + lax.broadcasted_iota(jnp.int32, (owner.size, band.chunk), 1)
    return owner.ids[:, None] * band.slots + number, number < band.slots


def _over_chunks(band: Band, body, carry):
    chunks = band.padded // band.chunk
    return body(0, carry) if chunks == 1 else lax.fori_loop(0, chunks, body, carry)


class Gradient(NamedTuple):
    """What a kernel has of a band's gradient, and of its taps."""

    band: Any  # the slots as `band_gradient` or `scatter` left them
    shares: Any
    taps: Any = None
    has_beta: bool = False  # whether beta has its row of the shares, the last one
    walked: int | None = None  # slots of owners from this one on were never written
    complete: bool = False  # all slots but slot 0 were


def finish_band(
    spec: Spec,
    band: Band,
    x: Array,
    gradient: Array,
    ends: tuple[Array, Array],
    owner: Side,
    visited: int,
    refs: Gradient,
    share: Array | int,
) -> Array:
    """Adds to x's gradient what flows through its band, and writes share number `share` of the taps' gradients.

    Slots that were never written are never read, as are those whose partner lies outside [0, visited).
    """
    barrier(spec)

    def chunk(step, gradient):
        first = step * band.chunk
        index, _ = _slots(band, owner, first)
        number = index - owner.ids[:, None] * band.slots
        partner = owner.ids[:, None] + number - band.radius
        written = (number > 0) & (number < 2 * band.radius) & (partner >= 0) & (partner < visited)
        if refs.walked is not None:
            written &= owner.ids[:, None] < refs.walked
        if refs.complete and band.slots == band.padded:  # nothing to ask for: slot 0 is taken from `ends`
            values = plgpu.load(refs.band.at[index])
        else:
            values = plgpu.load(refs.band.at[index], mask=written, other=0.0)
        values = jnp.where(number == 0, ends[0][:, None], values)
        if band.above:
            values = jnp.where(number == 2 * band.radius, ends[1][:, None], values)
        columns = pl.ds(first, band.chunk)
        if refs.has_beta:
            row = np.int32(0 if refs.taps is None else spec.width)
            refs.shares[share, row, columns] = jnp.sum(values, axis=0)
        if refs.taps is not None:
            taps = refs.taps[pl.ds(0, spec.width), columns]
            gradient = wide_dot(spec, gradient, values, taps, (1, 1), narrow=x.dtype != jnp.float32)
            refs.shares[share, pl.ds(0, spec.width), columns] = tap_dot(spec, x, values, (0, 0))
        return gradient

    return _over_chunks(band, chunk, gradient)


class Bands:
    """Both bands of one tile; `zone` says where the keys lie, seen from the queries."""

    def __init__(self, spec: Spec, i: Side, j: Side, zone: int, refs, query_below: Array | None = None):
        self.spec, self.i, self.j = spec, i, j
        query_ref, key_ref = refs
        self.query = spec.query_band and read_band(spec.query_band, query_ref, i, j, zone, query_below)
        self.key = spec.key_band and read_band(spec.key_band, key_ref, j, i, -zone)

    def affine(self, product: Array | None) -> tuple[Array, float, Array]:
        """(x, a, b) of scores a x + b, a > 0, with a number b per query: the product itself where all else is that."""
        spec, zeros = self.spec, jnp.zeros((self.i.size,), jnp.float32)
        if product is None or spec.content <= 0 or self.key or (self.query and self.query.strip):
            return self.scores(product), 1.0, zeros
        below = self.query.below if self.query else None
        return product, spec.content * LOG2E, zeros if below is None else below

    def scores(self, product: Array | None, start: Array | None = None) -> Array:
        """content * q_i.k_j plus the bands, on top of a number per query."""
        spec, i, j = self.spec, self.i, self.j
        bias = start if start is None else i.spread(start)
        if self.query and spec.query_band:
            bias = self.query.bias(i, j, spec.query_band.radius, start)
        if self.key and spec.key_band:
            by_key = self.key.bias(j, i, spec.key_band.radius, None)
            bias = by_key if bias is None else bias if by_key is None else bias + by_key
        bias = 0.0 if bias is None else bias
        if product is None:
            return jnp.broadcast_to(bias, (i.size, j.size) if i.axis == 0 else (j.size, i.size))
        return fma(spec, product, spec.content * LOG2E, bias)
