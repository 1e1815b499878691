"""A dense convolution over three tokens makes the values.

    python -m convattn_jax.main --config=configs/dense_values.py

Three times the values' parameters and multiplications: the price of what `depthwise_values` gets for little. Positions
are absolute, for the reason that stands there.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "tiny") -> ConfigDict:
    c = base.get_config(size)
    c.name = base.name("dense_values", size)
    c.model.value.kind = "grouped"
    c.model.value.radius = 1
    return c
