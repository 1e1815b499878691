"""What the tests of fine-tuning start from, and how they look at what it left."""

import contextlib
import json
import pathlib
import random

import jax
import numpy as np
import pytest
import tiny

from convattn_jax import checkpoint, finetune, inference, main, pretrain
from convattn_jax.glue.tasks import TASKS

ROOT = pathlib.Path(main.__file__).parent.parent
CONFIG = f"--config={ROOT / 'configs' / 'glue.py'}"
PROBE = ["--config.glue.tasks=word_order", "--config.glue.length=16"]
LABELS = ("entailment", "not_entailment", "neutral")


def write_tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]))


def write_glue(folder, rows=8):
    """MNLI, RTE, STS-B and AX in the original layout; the sentences are of the text that the run was trained on."""
    draw = random.Random(1)

    def pair():
        return [" ".join(draw.choices(tiny.WORDS.split(), k=4)) for _ in range(2)]

    names = {"MNLI": "gold_label", "RTE": "label", "STS-B": "score"}
    of = {"MNLI": ("contradiction", "entailment", "neutral"), "RTE": LABELS[:2], "STS-B": ("0.5", "2.0", "4.5")}
    stems = {"MNLI": ["dev_matched", "dev_mismatched"], "RTE": ["dev"], "STS-B": ["dev"]}
    for task, label in names.items():
        front = ["index", "sentence1", "sentence2"]
        for stem in ["train", *stems[task]]:
            labelled = [[i, *pair(), of[task][i % len(of[task])]] for i in range(rows)]
            write_tsv(folder / task / f"{stem}.tsv", [*front, label], labelled)
        for stem in [stem.replace("dev", "test") for stem in stems[task]]:
            write_tsv(folder / task / f"{stem}.tsv", front, [[i, *pair()] for i in range(rows)])
    write_tsv(
        folder / "AX" / "diagnostic.tsv", ["index", "sentence1", "sentence2"], [[i, *pair()] for i in range(rows)]
    )
    return folder


def fill(home):
    """Writes a text, a run with a checkpoint of its first parameters, and GLUE files."""
    tiny.write_corpus(home / "text.txt")
    tiny.write_config(home, model__layers=1, data__heldout_fraction=0.3)

    def save_at_once(run):
        with contextlib.closing(checkpoint.Checkpoints(run.folder.checkpoints, keep=1)) as checkpoints:
            checkpoints.save(run.program.init(jax.random.key(0)))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain._Run, "complete", save_at_once)
        main.main(["main", f"--config={home / 'config.py'}", f"--workdir={home / 'run'}"])
    write_glue(home / "glue")


def start(home, *args):
    main.main(["main", CONFIG, f"--config.init_from={home / 'run'}", *args])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def params_of(home, folder, task, seed):
    model = finetune.classifier(inference.load_run(home / "run"), TASKS[task].outputs)
    return checkpoint.load_params(
        folder / "checkpoints" / task, jax.eval_shape(model.initial_params, jax.random.key(0)), seed
    )


def assert_same(a, b):
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
