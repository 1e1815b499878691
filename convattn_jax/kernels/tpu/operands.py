"""What the TPU kernels take: static facts, arrays, and which block of each a program sees.

Every array but the rows has tokens along its lanes, so that a few numbers per token take no more memory than that.
"""

import dataclasses
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from convattn_jax.kernels.inputs import Band

LANES = 128  # of a register

Leaf = Any  # an array; in a kernel its reference; in a call of Pallas its block


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a call."""

    edge: int  # queries and keys of a tile
    tiles: int  # along the queries, and along the keys
    content: float  # factor of q_i.k_j; 0 leaves the product out
    query_band: Band | None
    key_band: Band | None
    rate: float
    interpret: bool

    @property
    def lanes(self) -> int:
        """Width of a band's strip; fewer than a register's only in tests."""
        return min(LANES, self.edge)


class Operands(NamedTuple):
    """What every pass reads; P is the padded length, C slots."""

    q: Leaf  # (B, H, P, K)
    k: Leaf
    v: Leaf
    query_slots: Leaf | None  # (B, H, C, P) float32
    key_slots: Leaf | None
    query_segments: Leaf | None  # (B, 1, P) int32, no padding query equal to any key
    key_segments: Leaf | None
    query_factors: Leaf | None  # (B, H, 1, P) int32, for dropout
    key_factors: Leaf | None


def by_tokens(edge: int, rows: int, axis: int) -> pl.BlockSpec:
    """The columns of a tile of an array (B, H, rows, P); `axis` of the grid counts the tiles."""
    return pl.BlockSpec((None, None, rows, edge), lambda b, h, *tile: (b, h, 0, tile[axis]))


def rows_of(edge: int, head_size: int, axis: int) -> pl.BlockSpec:
    """The rows of a tile of an array (B, H, P, K)."""
    return pl.BlockSpec((None, None, edge, head_size), lambda b, h, *tile: (b, h, tile[axis], 0))


def blocks(spec: Spec, operands: Operands, query_axis: int) -> Operands:
    """The blocks of a grid (B, H, tiles, tiles), whose last two axes count the tiles of queries and of keys, in the
    order that `query_axis`, 0 or 1, gives.
    """
    edge, head_size, key_axis = spec.edge, operands.q.shape[-1], 1 - query_axis

    def segments(axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, edge), lambda b, h, *tile: (b, 0, tile[axis]))

    rows = [rows_of(edge, head_size, axis) for axis in (query_axis, key_axis)]
    return Operands(
        q=rows[0],
        k=rows[1],
        v=rows[1],
        query_slots=spec.query_band and by_tokens(edge, spec.query_band.slots, query_axis),
        key_slots=spec.key_band and by_tokens(edge, spec.key_band.slots, key_axis),
        query_segments=None if operands.query_segments is None else segments(query_axis),
        key_segments=None if operands.key_segments is None else segments(key_axis),
        query_factors=None if operands.query_factors is None else by_tokens(edge, 1, query_axis),
        key_factors=None if operands.key_factors is None else by_tokens(edge, 1, key_axis),
    )


def compiler_params() -> pltpu.CompilerParams:
    """A grid of independent programs, the last axis in order: it adds up."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))
