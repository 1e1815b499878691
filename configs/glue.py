"""Fine-tuning of a pre-trained run: GLUE, or three small probes made of the run's own held-out text.

    python -m convattn_jax.main --config=configs/glue.py --config.init_from=runs/composite

trains the probes, anywhere, in minutes. GLUE itself, from a folder of the original TSV files:

    python -m convattn_jax.main --config=configs/glue.py --config.init_from=runs/composite-base \
        --config.glue.tasks=all --config.glue.source=tsv --config.glue.data_dir=glue
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.task = "finetune"
    c.name = ""  # empty: NAME-glue beside the run it starts from
    c.init_from = ""  # a pre-training run folder

    c.glue = glue = ConfigDict()
    glue.tasks = ("word_order", "adjacent", "distance")  # or mnli, cola, ...; ax goes with mnli; all: GLUE
    glue.source = "tsv"  # of GLUE's tasks: tsv (a folder of the original files) | tfds
    glue.data_dir = ""  # the folder; empty with tfds: TFDS's own default
    glue.preset = "electra"  # electra | electra_base | stable; the probes have a preset of their own
    glue.learning_rate = 0.0  # the peak; 0: the preset's
    glue.epochs = 0  # passes over a task's training rows; 0: as many as the preset's steps or epochs come to
    glue.seeds = 0  # runs of each task; 0: ten, and two of a probe
    glue.together = 0  # seeds trained as one program; 0: as many as fit into memory
    glue.length = 128  # tokens of a text or pair, at most; 8 to 128
    glue.save_seconds = 600.0  # between two saves while the seeds of a task train

    c.watchdog = watchdog = ConfigDict()  # of runs of several processes
    watchdog.killed_seconds = 100  # until the others miss a process that is gone, and end
    watchdog.frozen_seconds = 300  # without progress, until a process says where it stands and ends
    return c
