"""The peak learning rate, for absolute positions and for composite attention: what comes before any comparison.

    python -m convattn_jax.sweep --sweep=configs/sweeps/rates.py:small --config.data.files='text/*.txt.xz' \
        --config.train.steps=1550

The schedule scales with the steps, so a scan of a quarter of the length says more than the start of a long run.
"""

from configs.sweeps import SCHEDULE, variant
from convattn_jax.config import check_choice
from convattn_jax.sweep import Sweep

RATES = {
    "tiny": (1e-3, 2e-3, 3e-3, 5e-3),
    "small": (5e-4, 1e-3, 2e-3),
    "base": (1e-4, 2e-4, 4e-4),
    "large": (5e-5, 1e-4, 2e-4),
}


def get_sweep(size: str = "tiny") -> Sweep:
    check_choice("size", size, RATES)
    made = tuple(
        variant(f"{name}_{rate:g}", file, size, optimizer__learning_rate=rate)
        for name, file in (("absolute", "bert"), ("composite", "composite"))
        for rate in RATES[size]
    )
    often = {} if size == "tiny" else {"train.eval_every": 100}  # such runs are shorter than one of their intervals
    return Sweep(variants=made, changes=SCHEDULE | often, sentence="")
