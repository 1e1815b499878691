"""The attention kernels for TPUs, in Pallas through Mosaic."""

from convattn_jax.kernels.tpu.attention import composite_attention

__all__ = ["composite_attention"]
