"""A GPU to lower for where there is none: Triton's lowering in JAX 0.11 asks which it is."""

import contextlib

from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh


def absent_gpu() -> contextlib.AbstractContextManager:
    """A block in which programs can be traced and lowered for an H200."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device))
