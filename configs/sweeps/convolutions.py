"""Where a depthwise-separable convolution is put, beside absolute positions and beside composite attention.

python -m convattn_jax.sweep --sweep=configs/sweeps/convolutions.py --seeds=0,1,2
"""

from configs.sweeps import COMPOSITE, SCHEDULE, probes, variant
from convattn_jax.sweep import Sweep

PLACES = {
    "values": "depthwise_values",
    "query_key": "depthwise_query_key",
    "query_key_values": "depthwise_qkv",
    "half_of_values": "mixed_values",
    "branch": "depthwise_branch",
}
BASES = {
    "absolute": {"model__positions": "absolute"},
    "composite": {"model__positions": "none", "model__scores": COMPOSITE},
}


def get_sweep(size: str = "tiny") -> Sweep:
    return Sweep(variants=variants(size), finetunings=(probes(),), changes=SCHEDULE)


def variants(size: str):
    plain = (variant("absolute", "bert", size), variant("composite", "composite", size))
    added = tuple(
        variant(f"{base}+depthwise_{place}", file, size, **changes)
        for base, changes in BASES.items()
        for place, file in PLACES.items()
    )
    return plain + added
