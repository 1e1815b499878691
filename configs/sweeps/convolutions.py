"""Where a depthwise-separable convolution is put, alone and beside composite attention.

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


def get_sweep(size: str = "tiny") -> Sweep:
    return Sweep(variants=variants(size), finetunings=(probes(),), changes=SCHEDULE)


def variants(size: str):
    plain = (variant("absolute", "bert", size), variant("composite", "composite", size))
    alone = tuple(variant(f"depthwise_{place}", file, size) for place, file in PLACES.items())
    beside = tuple(
        variant(f"composite+depthwise_{place}", file, size, model__scores=COMPOSITE) for place, file in PLACES.items()
    )
    return plain + alone + beside
