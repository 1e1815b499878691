"""What a file in configs/sweeps says: which variants, which seeds, and the stages that each run goes through."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from convattn_jax.config import check, check_choice

Changes = Mapping[str, Any]  # "model.radius" -> 4

SENTENCE = "The dog that chased the small cat was tired."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
PRETRAIN, EVALUATE = "pretrain", "evaluate"  # the stages that every run goes through, before its fine-tunings


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
      name: of the row and of its run folders, NAME-SEED.
      config: the configuration it starts from, FILE[:SIZE].
      changes: what is different about it; the command line cannot change these.
      seeds: its own; none: those of the sweep.
    """

    name: str
    config: str
    changes: Changes = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    def __post_init__(self):
        _check_tuples(self, "seeds")
        _check_numbers(self, "seeds", 0)
        _check_changes(self)


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """A fine-tuning that each run goes through; it leaves a folder NAME-SEED-`name` beside the run's."""

    name: str
    config: str
    changes: Changes = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_changes(self)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A comparison.

    Attributes:
      variants: its rows, in the order of the report.
      finetunings: what follows pre-training.
      seeds: of the pre-trainings.
      changes: to the configuration of every variant; a variant's own come after them.
      lengths: row lengths at which the trained models are evaluated too.
      sentence: whose attention maps are kept; '': none.
      baseline: the variant that the report compares the others with; '': `absolute`, or else the first.
    """

    variants: tuple[Variant, ...]
    finetunings: tuple[Finetuning, ...] = ()
    seeds: tuple[int, ...] = (0,)
    changes: Changes = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    sentence: str = SENTENCE
    baseline: str = ""

    def __post_init__(self):
        _check_tuples(self, "variants", "finetunings", "seeds", "lengths")
        _check_numbers(self, "seeds", 0)
        _check_numbers(self, "lengths", 1)
        _check_changes(self)
        names = [variant.name for variant in self.variants]
        check(bool(names), "variants: the sweep has none")
        stages = [PRETRAIN, EVALUATE, *(one.name for one in self.finetunings)]
        for field, given in (("variants", names), ("finetunings", stages)):
            for name in given:
                check(given.count(name) == 1, f"{field}: the name {name} stands there twice")
                check(
                    _NAME.fullmatch(name) is not None, f"{field}: the name {name!r} has letters that a folder's lacks"
                )
        if not self.baseline:
            object.__setattr__(self, "baseline", "absolute" if "absolute" in names else names[0])
        check_choice("baseline", self.baseline, names)
        check(bool(self.seeds), "seeds: name at least one")


def _check_tuples(entry: object, *fields: str) -> None:
    for field in fields:
        given = getattr(entry, field)
        shown = f"{field}={given!r}" if isinstance(given, int) else field
        check(isinstance(given, tuple), f"{shown} must be a tuple, with a comma after even a single entry, as (0,)")


def _check_numbers(entry: object, field: str, least: int) -> None:
    given = getattr(entry, field)
    good = all(isinstance(one, int) and not isinstance(one, bool) and one >= least for one in given)
    check(good, f"{field}={given!r} must be whole numbers from {least} on")
    check(len(set(given)) == len(given), f"{field}={given!r} names a number twice")


def _check_changes(entry: Any) -> None:
    given = entry.changes
    good = isinstance(given, Mapping) and all(isinstance(key, str) for key in given)
    check(good, f'changes={given!r} must name keys with their values, as {{"model.radius": 4}}')
