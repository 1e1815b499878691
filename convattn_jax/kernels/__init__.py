"""Fused kernels, and the table that chooses between them and the plain form.

A kernel's own module is imported by whoever calls it: `composite` for NVIDIA GPUs, `tpu` for TPUs.
"""

from convattn_jax.kernels.choice import Call, default_platform, implementation
from convattn_jax.kernels.inputs import supports

__all__ = ["Call", "default_platform", "implementation", "supports"]
