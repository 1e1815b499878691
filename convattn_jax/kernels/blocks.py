"""Tile sizes of the attention kernels: a committed table, since tuning at run time would change bits between runs."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, depth of the software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tile of each pass; without `dkv` that of `dq` holds all, or all keys, and its pass is all of backward."""

    forward: Tile
    dq: Tile
    dkv: Tile | None

    @property
    def largest(self) -> int:
        """The multiple that lengths are padded to, in bookkeeping arrays only."""
        tiles = [tile for tile in (self.forward, self.dq, self.dkv) if tile]
        return max(max(tile.queries, tile.keys) for tile in tiles)


# (bytes of an element, head size up to) -> tiles. For bfloat16 and head size 64, dq and dkv are the fastest on an H200
# of `python -m benchmarks.attention --candidates`; forward has two stages for its registers, which admit more programs
# to a multiprocessor than with three (compiled, not timed).
LONG = {
    (2, 64): Blocks(Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(32, 128, 4, 3)),
    (2, 128): Blocks(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (4, 64): Blocks(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (4, 128): Blocks(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}
# 65 to 128 tokens, bfloat16, head size up to 64, with taps: the fastest there too
SHORT_WITH_TAPS = Blocks(Tile(64, 128, 4, 1), Tile(16, 128, 4, 3), None)


def choose(length: int, head_size: int, dtype: DTypeLike, taps: bool) -> Blocks:
    """The tiles for a length, a head size, a dtype and whether there are taps."""
    size = jnp.dtype(dtype).itemsize
    long = LONG[size, 64 if head_size <= 64 else 128]
    one_pass = 32 if size == 4 else 64 if taps else 128
    if length > one_pass:
        return SHORT_WITH_TAPS if size == 2 and length <= 128 and head_size <= 64 else long
    edge = power_of_two(length)
    tile = Tile(edge, edge, 8 if edge == 128 else 4, 1)
    return Blocks(forward=tile, dq=tile, dkv=None)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and at least 16, the smallest side of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())
