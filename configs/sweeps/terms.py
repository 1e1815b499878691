"""What each convolutional term adds to content: all eight subsets, beside absolute positions.

python -m convattn_jax.sweep --sweep=configs/sweeps/terms.py
"""

import itertools

from configs.sweeps import SCHEDULE, probes, variant
from convattn_jax.sweep import Sweep

TERMS = {"fixed": "fixed", "query": "dynamic_query", "key": "dynamic_key"}


def get_sweep(size: str = "tiny") -> Sweep:
    subsets = [chosen for count in range(4) for chosen in itertools.combinations(TERMS, count)]
    made = []
    for chosen in subsets:
        changes = {"model__scores": ("content", *(TERMS[name] for name in chosen))}
        if size == "tiny" and chosen == ("fixed",):
            changes["model__taps_init"] = "wide"  # as in configs/fixed.py
        made.append(variant("+".join(("content", *chosen)), "no_positions", size, **changes))
    return Sweep((variant("absolute", "bert", size), *made), finetunings=(probes(),), changes=SCHEDULE)
