"""Depthwise-separable convolution makes the values (Chang et al. 2021, section 4), content attention mixes them.

    python -m convattn_jax.main --config=configs/depthwise_values.py

Positions are absolute. Without any, every [MASK] of a text would ask the same question and get the same answer
(docs/results.md): such values know their neighbours, but nothing tells a token which of them is its own.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "tiny") -> ConfigDict:
    c = base.get_config(size)
    c.name = base.name("depthwise_values", size)
    c.model.value.kind = "separable"
    return c
