"""The array operations that have faster forms. A model calls them by these names and knows no other form than the plain
one; `convattn_jax.kernels` puts fused kernels in their place, `convattn_jax.sharding` spreads them over a mesh.
"""

from typing import NamedTuple

from convattn_jax.model.attention import Attend, attend
from convattn_jax.model.convolution import Convolve, convolve
from convattn_jax.model.embedding import AddByIds, add_by_ids
from convattn_jax.model.layers import AddNorm, add_norm


class Operations(NamedTuple):
    """What a model is handed; the defaults are what each operation means."""

    attend: Attend = attend
    add_by_ids: AddByIds = add_by_ids
    convolve: Convolve = convolve
    add_norm: AddNorm = add_norm


PLAIN = Operations()
