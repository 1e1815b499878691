"""A model's operations in the forms that `model.kernel` asks for."""

from convattn_jax.kernels.attend import attend_by
from convattn_jax.kernels.convolve import convolve_by
from convattn_jax.kernels.normalise import add_norm_by
from convattn_jax.model.operations import PLAIN, Operations


def operations_by(kernel: str) -> Operations:
    """Fused kernels where they serve (`auto`), or the implementation that must serve every call."""
    return PLAIN._replace(attend=attend_by(kernel), convolve=convolve_by(kernel), add_norm=add_norm_by(kernel))
