"""The paper's claims: convolutions against absolute positions, kind by kind and place by place, on GLUE too.

    python -m convattn_jax.sweep --sweep=configs/sweeps/paper.py:small --config.data.files='text/train*.txt.xz' \
        --config.data.heldout_files='text/heldout*.txt.xz' --config.train.steps=6200 \
        --config.optimizer.learning_rate=RATE --finetune.glue.data_dir=glue

RATE is what rates.py chose. Three seeds for the variants that carry a claim, one for the others.
`--config.data.fraction=0.1` asks the same of a tenth of the text, in another --workdir.
"""

import dataclasses

from configs.sweeps import SCHEDULE, convolutions, glue, positions, probes
from convattn_jax.sweep import Sweep

CLAIMS = (
    *("absolute", "none", "fixed", "dynamic", "composite"),
    *("absolute+depthwise_values", "composite+depthwise_values"),
)


def get_sweep(size: str = "small") -> Sweep:
    found = {variant.name: variant for variant in (*positions.variants(size), *convolutions.variants(size))}
    rows = [dataclasses.replace(v, seeds=(0, 1, 2) if v.name in CLAIMS else (0,)) for v in found.values()]
    return Sweep(
        variants=tuple(sorted(rows, key=lambda v: v.name not in CLAIMS)),
        finetunings=(
            probes(),
            # at the preset's 3e-4 models with absolute positions ended at chance on CoLA and STS-B (docs/results.md)
            glue("cola", "sst2", "mrpc", "stsb", "rte", "wnli", seeds=3, learning_rate=1e-4),
        ),
        changes=SCHEDULE | {"train.eval_every": 500, "checkpoint.every_seconds": 60.0},
        lengths=(128, 512),
    )
