"""Bands of taps on a tile: what clipped taps add to its scores, and what flows back, without an array of T x T.

A token owns its slots; the positions within its band are fewer than the lanes of a register, so one lane per remainder
holds them all. In such a *strip* (owner, lane), the lane m stands for the band's position congruent to m, and since
tiles begin at multiples of the lanes, a strip is the same for every tile that the owner meets: slots turned into rows,
row i rolled by i - n. A tile is its strip repeated, and a comparison of positions says where the band ends.

The owner is the query for taps at c(j-i), the key for taps at c(i-j). `ahead` says how many tiles its partners lie
ahead of it.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from convattn_jax.kernels.inputs import Band
from convattn_jax.kernels.tpu.operands import Spec


def column(spec: Spec, row: Array) -> Array:
    """(1, edge) as (edge, 1)."""
    return jnp.broadcast_to(row, (spec.lanes, spec.edge)).T[:, :1]


def _strip(spec: Spec, band: Band, slots: Array) -> Array:
    """(C, edge) -> (edge, lanes): lane m of row i holds the slot of the band's position congruent to m."""
    missing = spec.lanes - band.slots
    if missing > 0:
        slots = jnp.concatenate([slots, jnp.zeros((missing, spec.edge), jnp.float32)])
    by_slot = pltpu.roll(slots[: spec.lanes].T, spec.lanes - band.radius, 1)  # lane s - n holds slot s
    return pltpu.roll(by_slot, 0, 1, stride=1, stride_axis=0)


def _slots(spec: Spec, band: Band, strip: Array) -> Array:
    """(edge, lanes) -> (edge, lanes): lane s of row i holds slot s; rolls row i back by i - n, bit by bit of i."""
    row = lax.broadcasted_iota(jnp.int32, strip.shape, 0)
    step = 1
    while step < spec.lanes:  # there is no strided roll to the left
        strip = jnp.where((row & step) != 0, pltpu.roll(strip, spec.lanes - step, 1), strip)
        step *= 2
    return pltpu.roll(strip, band.radius, 1)


def _distance(spec: Spec, owner_down: bool, ahead: Array) -> Array:
    """How far each partner lies ahead of its owner."""
    down, across = (lax.broadcasted_iota(jnp.int32, (spec.edge, spec.edge), axis) for axis in (0, 1))
    return (across - down if owner_down else down - across) + ahead * spec.edge


def bias(spec: Spec, band: Band, slots: Array, owner_down: bool, ahead: Array, near: bool) -> Array:
    """What the slots (C, edge) of a tile's owners add to its scores; broadcasts to the tile where it isn't near."""
    n = band.radius
    below = slots[:1]
    above = slots[2 * n : 2 * n + 1] if band.above else jnp.zeros_like(below)
    if not near:
        far = jnp.where(ahead < 0, below, above)
        return column(spec, far) if owner_down else far
    strip, repeats = _strip(spec, band, slots), spec.edge // spec.lanes
    if owner_down:
        below, above, on_band = column(spec, below), column(spec, above), jnp.concatenate([strip] * repeats, axis=1)
    else:
        on_band = jnp.concatenate([strip.T] * repeats, axis=0)
    distance = _distance(spec, owner_down, ahead)
    return jnp.where(distance <= -n, below, jnp.where(distance >= n, above, on_band))


# --- gradients, of owners that lie down the tile ---------------------------------------------------------------------


def sums(spec: Spec, band: Band | None):
    """Memory for the sums of one tile of owners: the strip, lane by lane what lies below, and what lies above."""
    return None if band is None else pltpu.VMEM((2 + band.above, spec.edge, spec.lanes), jnp.float32)


def add(spec: Spec, band: Band, sums_ref, d_scores: Array, ahead: Array, near: bool) -> None:
    """Adds a tile to the sums. Each place of the strip gets one element of the score's gradient, and zeros."""
    if not near:
        far = _fold(spec, d_scores)
        sums_ref[1] += jnp.where(ahead < 0, far, 0.0)
        if band.above:
            sums_ref[2] += jnp.where(ahead > 0, far, 0.0)
        return
    distance = _distance(spec, True, ahead)
    below, above = distance <= -band.radius, distance >= band.radius
    sums_ref[0] += _fold(spec, jnp.where(below | above, 0.0, d_scores))
    sums_ref[1] += _fold(spec, jnp.where(below, d_scores, 0.0))
    if band.above:
        sums_ref[2] += _fold(spec, jnp.where(above, d_scores, 0.0))


def _fold(spec: Spec, tile: Array) -> Array:
    """(edge, edge) -> (edge, lanes): the sum of its repeats."""
    parts = [tile[:, first : first + spec.lanes] for first in range(0, spec.edge, spec.lanes)]
    return functools.reduce(jnp.add, parts)


def write(spec: Spec, band: Band, sums_ref, slots_ref) -> None:
    """The gradient of the slots, (C, edge), every one of them: those whose partner lies outside the row are zero."""
    slots = _slots(spec, band, sums_ref[0]).T
    missing = band.slots - spec.lanes
    if missing > 0:
        slots = jnp.concatenate([slots, jnp.zeros((missing, spec.edge), jnp.float32)])
    slots = slots[: band.slots]
    number = lax.broadcasted_iota(jnp.int32, slots.shape, 0)
    slots = jnp.where(number == 0, _total(sums_ref[1]), slots)
    if band.above:
        slots = jnp.where(number == 2 * band.radius, _total(sums_ref[2]), slots)
    slots_ref[...] = slots


def _total(partial: Array) -> Array:
    """(edge, lanes) -> (1, edge)."""
    return jnp.sum(partial.T, axis=0, keepdims=True)
