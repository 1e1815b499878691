"""Half of the heads' values convolved depthwise-separably, half projected (Chang et al. 2021, section 4).

    python -m convattn_jax.main --config=configs/mixed_values.py

Between `depthwise_values` and plain values: half of the heads still see single words. Positions are absolute, for the
reason that stands there.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "tiny") -> ConfigDict:
    c = base.get_config(size)
    c.name = base.name("mixed_values", size)
    c.model.value.kind = "separable"
    c.model.value.half = True
    return c
