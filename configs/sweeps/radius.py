"""How far the taps of composite attention reach.

python -m convattn_jax.sweep --sweep=configs/sweeps/radius.py
"""

from configs.sweeps import SCHEDULE, probes, variant
from convattn_jax.sweep import Sweep

RADII = (2, 4, 8, 16, 32)


def get_sweep(size: str = "tiny") -> Sweep:
    reaching = (variant(f"composite_r{radius}", "composite", size, model__radius=radius) for radius in RADII)
    return Sweep((variant("absolute", "bert", size), *reaching), finetunings=(probes(),), changes=SCHEDULE)
