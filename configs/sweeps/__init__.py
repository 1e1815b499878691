"""Comparisons: each file lists variants, and what every one of them goes through.

python -m convattn_jax.sweep --sweep=configs/sweeps/demo.py
"""

import pathlib
from typing import Any

from convattn_jax.sweep import Finetuning, Variant

CONFIGS = pathlib.Path(__file__).resolve().parent.parent

# Comparisons train for thousands of updates, not the reference's million, of which it warms up over a hundredth: of
# 1,550 that is 15, and then a small model at 1e-3 never leaves the unigram model (docs/results.md).
SCHEDULE = {"optimizer.warmup": 0.1}
COMPOSITE = ("content", "fixed", "dynamic_query")


def variant(name: str, file: str, size: str, seeds: tuple[int, ...] = (), **changes: Any) -> Variant:
    """A row by a file of configs/; changes as model__radius=4."""
    return Variant(
        name, f"{_path(file)}:{size}", {key.replace("__", "."): value for key, value in changes.items()}, seeds
    )


def probes(**changes: Any) -> Finetuning:
    """The three small probes of what positions give a model, made of the held-out text."""
    return Finetuning("probes", _path("glue"), {f"glue.{key}": value for key, value in changes.items()})


def glue(*tasks: str, **changes: Any) -> Finetuning:
    """Tasks of GLUE; the command line names their files, --finetune.glue.data_dir=FOLDER."""
    return Finetuning(
        "glue", _path("glue"), {f"glue.{key}": value for key, value in {"tasks": tasks, **changes}.items()}
    )


def _path(file: str) -> str:
    path = CONFIGS / f"{file}.py"
    here = pathlib.Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
