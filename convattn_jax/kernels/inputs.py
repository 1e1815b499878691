"""What every fused kernel takes, made of what attention takes: taps as slots, padded segments.

A row of the bias is one value far below the diagonal, 2n-1 values on the band and one far above it. Softmax ignores a
constant added to a row, so taps that depend on the row only lose their last value to the others: 2n *slots* per token.
Taps that depend on the key keep all 2n+1. Slot s stands at distance s-n from its owner.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Band:
    """The taps of one side: `radius` n, and whether slot 2n, everything further above, is kept."""

    radius: int
    above: bool

    @property
    def slots(self) -> int:
        """Numbers per token."""
        return 2 * self.radius + self.above


NO_KEY, NO_QUERY = -1, -2  # segments that meet no other


def supports(length: int, keys: int, head_size: int, dtype) -> str | None:
    """Why the kernels can't take a shape; None when they can."""
    if keys != length:
        return f"queries and keys differ in number ({length}, {keys})"
    if head_size % 8 or not 8 <= head_size <= 128:
        return f"head size {head_size} is no multiple of 8 up to 128"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name} is neither bfloat16 nor float32"
    return None


def common_radius(length: int, *taps: Array | None) -> int | None:
    """The radius that serves all of them, at least 1, and no more than the length; None without taps."""
    radii = [array.shape[-1] // 2 for array in taps if array is not None]
    return min(max(*radii, 1), length) if radii else None


def slots(taps: Array, radius: int, above: bool) -> Array:
    """Taps as slots up to `radius`, float32; `above`: slot 2n, everything further above, is kept."""
    taps = _reach(taps.astype(jnp.float32), radius)
    return taps if above else taps[..., :-1] - taps[..., -1:]


def _reach(taps: Array, radius: int) -> Array:
    """The same function of distance with taps up to `radius`; what is cut lies beyond every pair of tokens."""
    more = radius - taps.shape[-1] // 2
    if more < 0:
        return taps[..., -more:more]
    return jnp.pad(taps, [(0, 0)] * (taps.ndim - 1) + [(more, more)], mode="edge") if more else taps


def padded_segments(query_segments: Array, key_segments: Array, padded: int) -> tuple[Array, Array]:
    """Segments of `padded` tokens, of which a query and a key meet iff their numbers agree."""
    more = ((0, 0), (0, padded - key_segments.shape[1]))
    hidden = jnp.where(key_segments == 0, NO_KEY, key_segments)
    return (
        jnp.pad(query_segments.astype(jnp.int32), more, constant_values=NO_QUERY),
        jnp.pad(hidden.astype(jnp.int32), more, constant_values=NO_KEY),
    )
