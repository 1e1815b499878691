"""A grouped convolution makes the values, one group of channels per head.

    python -m convattn_jax.main --config=configs/grouped_values.py

D^2 W/H parameters a layer: many more than a depthwise-separable one of the same reach. Positions are absolute, for the
reason that stands in `depthwise_values`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "tiny") -> ConfigDict:
    c = base.get_config(size)
    c.name = base.name("grouped_values", size)
    c.model.value.kind = "grouped"
    c.model.value.groups = c.model.heads
    return c
