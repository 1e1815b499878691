"""The array operations that have faster forms. A model calls them by these names and knows no other form than the plain
one; `convattn_jax.kernels` puts fused kernels in their place, `convattn_jax.sharding` spreads them over a mesh.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from convattn_jax.model.attention import Attend, attend
from convattn_jax.model.convolution import Convolve, convolve
from convattn_jax.model.embedding import AddByIds, add_by_ids
from convattn_jax.model.layers import AddNorm, add_norm


def same(x: Array) -> Array:
    """Hands on what it is given: on one device arrays stand where they are needed."""
    return x


class Operations(NamedTuple):
    """What a model is handed; the defaults are what each operation means."""

    attend: Attend = attend
    add_by_ids: AddByIds = add_by_ids
    convolve: Convolve = convolve
    add_norm: AddNorm = add_norm
    hold: Callable[[Array], Array] = same  # the embeddings (B, T, E), once they are summed
    gather: Callable[[Array], Array] = same  # the token embedding (V, E), before its use


PLAIN = Operations()
