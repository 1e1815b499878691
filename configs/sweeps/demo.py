"""The demonstration in small: what do positions give a model? Three variants, one seed, a third of the steps.

python -m convattn_jax.sweep --sweep=configs/sweeps/demo.py
python -m convattn_jax.report sweeps/demo
"""

from configs.sweeps import probes, variant
from convattn_jax.sweep import Sweep


def get_sweep(size: str = "tiny") -> Sweep:
    return Sweep(
        variants=(
            variant("absolute", "bert", size),
            variant("none", "no_positions", size),
            variant("composite", "composite", size),
        ),
        # half the epochs of the presets at a rate that only so small a model bears
        finetunings=(probes(tasks=("word_order", "distance"), seeds=1, epochs=4, learning_rate=5e-4),),
        changes={"train.steps": 270, "train.log_every": 10, "train.eval_every": 30},
        lengths=(256,),
        sentence="Returns the shape of the array that was given, or zero.",
    )
