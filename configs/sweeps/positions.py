"""How a model is told the order of words: nine answers.

python -m convattn_jax.sweep --sweep=configs/sweeps/positions.py --seeds=0,1,2
"""

from configs.sweeps import SCHEDULE, probes, variant
from convattn_jax.sweep import Sweep


def get_sweep(size: str = "tiny") -> Sweep:
    return Sweep(variants=variants(size), finetunings=(probes(),), changes=SCHEDULE)


def variants(size: str):
    return (
        variant("absolute", "bert", size),
        variant("none", "no_positions", size),
        variant("shaw", "shaw", size),
        variant("t5", "t5", size),
        variant("rope", "rope", size),
        variant("alibi", "alibi", size),
        variant("fixed", "fixed", size),
        variant("dynamic", "dynamic_query", size),
        variant("composite", "composite", size),
    )
