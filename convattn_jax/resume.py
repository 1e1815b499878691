"""What of a configuration may change when a run is resumed, and why the rest may not."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convattn_jax.config import UserError, check, flatten

# Where it runs, not what it computes: may differ at any time.
FREE = ("name", "mesh", "checkpoint", "data.cache_dir", "data.workers", "resume", "watchdog")

# What another value of is a decision, and safe: the state keeps its shapes and each step stays a function of the step.
CHANGEABLE = (
    *(f"optimizer.{key}" for key in ("learning_rate", "warmup", "b1", "b2", "eps", "weight_decay", "clip")),
    *(f"train.{key}" for key in ("steps", "accumulate", "log_every", "eval_every", "eval_rows")),
    *(f"train.{key}" for key in ("skip_nonfinite", "deterministic")),
    *(f"model.{key}" for key in ("dropout", "attention_dropout", "dtype", "kernel", "remat")),
)
FIXED = {  # the longest that matches counts
    "": "it says what the run is",
    "seed": "the order of the rows, their masks and dropout are functions of it",
    "data": "the run has been trained on these rows",
    "tokenizer": "the ids of the run's tokens are functions of it",
    "model": "parameters would change their shapes or their meaning",
    "masking": "held-out losses before and after could not be compared",
    "train.batch_size": "the place in the stream of rows is counted in batches",
}

# Keys younger than the first run folders, with the value that means what was done before there was the key.
ADDED = {
    "data.fraction": 1.0,
    "train.skip_nonfinite": 0,
    "train.deterministic": False,
    "resume.allow": [],
    "mesh.dry_run": False,
    "mesh.chips": "",
    "watchdog.killed_seconds": 100,
    "watchdog.frozen_seconds": 300,
    "glue.learning_rate": 0.0,
    "glue.epochs": 0,
}


@dataclasses.dataclass(frozen=True)
class ResumeConfig:
    """What to change on purpose; `configs/base.py` documents the key."""

    allow: tuple[str, ...]

    def __post_init__(self):
        for key in self.allow:
            if key not in CHANGEABLE:
                why = FIXED[max((name for name in FIXED if _within(key, name)), key=len)]
                raise UserError(
                    f"resume.allow={key} cannot be changed in a run that has begun: {why}; choose another --workdir. "
                    f"These can: {', '.join(CHANGEABLE)}"
                )


@dataclasses.dataclass(frozen=True)
class Change:
    """A key with another value than the run was made with."""

    key: str
    before: Any
    now: Any


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the keys that it is too old to have."""
    for key, value in ADDED.items():
        *groups, leaf = key.split(".")
        target: Any = config
        for group in groups:
            whole = config.get("task") == "pretrain" and group != "glue"  # a task stores no other's parts
            target = target.setdefault(group, {}) if whole else target.get(group, {})
            if not isinstance(target, dict):
                return config
        target.setdefault(leaf, value)
    return config


def changes(stored: Mapping[str, Any], config: Mapping[str, Any], folder: object) -> list[Change]:
    """The keys that differ and may, because `resume.allow` names them.

    Raises:
      UserError: one differs that it does not name.
    """
    before, now = flatten(stored), flatten(config)
    task = now.get("task")
    check(
        before.get("task", task) == task,
        f"{folder} is the folder of another task, {before.get('task')}, not {task}: choose another --workdir",
    )
    allowed = now.get("resume.allow", ())
    found = []
    for key in sorted(before.keys() | now.keys()):
        if any(_within(key, name) for name in FREE) or before.get(key) == now.get(key):
            continue
        found.append(Change(key, before.get(key), now.get(key)))
        can_be_allowed = key in CHANGEABLE and "resume.allow" in now  # fine-tuning has no such key
        on_purpose = f", change it on purpose with --config.resume.allow={key}" if can_be_allowed else ""
        check(
            key in allowed,
            f"{folder} was made with {key}={before.get(key)}, not {now.get(key)}: give that value{on_purpose}, or "
            "another --workdir",
        )
    return found


def _within(key: str, name: str) -> bool:
    return not name or key == name or key.startswith(name + ".")
