"""Reading run folders as they are: finished, half done, failed or damaged; whatever is missing is named.

Nothing in a folder is trusted: numbers that are none and files that cannot be read count as missing.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from convattn_jax.config import UserError, check, check_choice, flatten
from convattn_jax.glue.tasks import TASKS
from convattn_jax.origin import CHANGED
from convattn_jax.resume import FREE, completed

LONGEST = 80  # characters of a name
PLACES = (*FREE, "seed")  # what makes no other variant
STAGES = ("pretrain", "evaluate")
NOT_STARTED = "not started"


@dataclasses.dataclass
class Run:
    """One pre-training run, what followed it, and what is missing of it.

    Attributes:
      curve: (step, held-out loss), rising.
      figures: numbers of summary.json.
      code: what trained it: the commit, beside the code's digest where that says more; '' where it was not noted.
      tasks: task -> main metric, one value a fine-tuning seed.
      by_label: task -> label -> (rows, rows predicted right), over all fine-tuning seeds.
      lengths: row length -> held-out loss; None where the model cannot be evaluated there.
      planned: whether a sweep says what there should be of it.
      stages: folders of the fine-tunings that it says.
      missing: what there should be and is not, in words.
      left_out: fine-tunings of a task that another one stands for.
    """

    name: str
    variant: str
    seed: int
    folder: pathlib.Path
    config: dict[str, Any]
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    hardware: str = ""
    code: str = ""
    fingerprint: str = ""
    tasks: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    by_label: dict[str, dict[int, tuple[int, int]]] = dataclasses.field(default_factory=dict)
    lengths: dict[int, float | None] = dataclasses.field(default_factory=dict)
    planned: bool = False
    stages: tuple[str, ...] = ()
    missing: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs by variant, in order, and the variant that the others are compared with ('': none)."""

    variants: dict[str, list[Run]]
    baseline: str
    sentence: str

    def runs(self) -> Iterator[Run]:
        """All of them."""
        for group in self.variants.values():
            yield from group

    def values(self, variant: str, measure: str) -> dict[int, float]:
        """A measure of a variant, by pre-training seed; of a task the mean over its fine-tuning seeds.

        A measure is a key of summary.json, `task:NAME`, `length:N` or `distance:N`.
        """
        found = {}
        for run in self.variants[variant]:
            value = _measure(run, measure)
            if value is not None:
                found[run.seed] = value
        return found


def _measure(run: Run, measure: str) -> float | None:
    if not run.figures:  # what is not trained to its end is not compared
        return None
    kind, colon, name = measure.partition(":")
    if not colon:
        return run.figures.get(measure)
    if kind == "task":
        values = run.tasks.get(name, [])
        return sum(values) / len(values) if values else None
    if kind == "length":
        return run.lengths.get(int(name))
    rows, hits = run.by_label.get("distance", {}).get(int(name), (0, 0))
    return hits / rows if rows else None


def collect(paths: Sequence[str], baseline: str = "", sentence: str = "") -> Comparison:
    """The runs of run folders and of folders that hold some.

    Raises:
      UserError: a path is not there or holds no run; the baseline is none of the variants.
    """
    planned: dict[str, Any] = {}
    runs: dict[pathlib.Path, Run] = {}
    tunings: dict[pathlib.Path, dict[str, Any]] = {}
    order: list[str] = []
    for given in paths:
        root = pathlib.Path(given).resolve()
        check(root.is_dir(), f"{given} is no folder: name run folders, or one that holds some")
        plan = read_object(root / "sweep.json")
        planned = {**plan, **planned}
        order += [text_of(name) for name in _list(plan.get("variants"))]
        holds = False
        for name, job in _dict(plan.get("jobs")).items():
            folder = root / pathlib.Path(name).name  # a name leads to no other place
            holds = True
            config = completed(read_object(folder / "config.json"))
            runs[folder] = _read(folder, config, text_of(_dict(job).get("variant")), _dict(job).get("seed"))
            _expect(runs[folder], root, _dict(job))
        for folder in _candidates(root):
            config = completed(read_object(folder / "config.json"))
            if config.get("task") == "finetune":
                tunings.setdefault(folder, config)
            elif config and folder not in runs and (folder == root or not is_run(root)):
                runs[folder] = _read(folder, config)
            holds = holds or folder in runs or folder in tunings
        check(holds, f"{given} holds no run: train one with convattn_jax.main")
    asked = {name for run in runs.values() for name in run.stages}
    for folder, config in sorted(tunings.items(), key=lambda item: item[0].name not in asked):
        _attach(folder, config, list(runs.values()))  # of two for one task, the one that the sweep asked for
    sources = ", ".join(dict.fromkeys(text_of(config.get("init_from")) for config in tunings.values()))
    check(bool(runs), f"{paths[0]} is fine-tuning only, made from {sources}: name that run")

    groups: dict[str, list[Run]] = {name: [] for name in order}
    for run in runs.values():
        groups.setdefault(run.variant, []).append(run)
    groups, split = _told_apart({name: group for name, group in groups.items() if group})
    groups = {name: sorted(group, key=lambda run: run.seed) for name, group in groups.items()}
    _note_tasks(groups)
    if baseline:
        check_choice("--baseline", baseline, groups)
    else:
        likely = (text_of(planned.get("baseline")), "absolute", "bert")
        baseline = next((name for one in likely for name in groups if one and name in (one, *split.get(one, ()))), "")
    return Comparison(groups, baseline, sentence or text_of(planned.get("sentence"), 400))


def _candidates(root: pathlib.Path) -> list[pathlib.Path]:
    """The root itself and what may be fine-tuned from it beside it, if it is a run; else the folders in it."""
    if is_run(root):
        return [root, *sorted(path for path in root.parent.glob(f"{_escaped(root.name)}-*") if path.is_dir())]
    return sorted(path for path in root.iterdir() if path.is_dir() and (path / "config.json").exists())


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is a run's, rather than one that holds some."""
    return (folder / "config.json").exists()


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _read(folder: pathlib.Path, config: dict[str, Any], variant: str = "", seed: Any = None) -> Run:
    """A run folder, with what is missing of the pre-training."""
    name = text_of(folder.name)
    label = variant or re.sub(r"-\d+$", "", text_of(config.get("name"))) or name
    number = seed if seed is not None else config.get("seed")
    run = Run(name, label, number if isinstance(number, int) else 0, folder, config)
    steps = _number(_dict(config.get("train")).get("steps"))
    rows = list(_rows(folder / "metrics.jsonl"))
    points = {
        step: loss for row in rows if (step := _number(row.get("step"))) and (loss := _number(row.get("eval_loss")))
    }
    run.curve = sorted(points.items())
    summary = read_object(folder / "summary.json")
    run.figures = {key: value for key, raw in summary.items() if (value := _number(raw)) is not None}
    run.hardware = text_of(summary.get("hardware"))
    run.code = ", then ".join(dict.fromkeys(filter(None, map(_code, _rows(folder / "starts.jsonl")))))
    run.fingerprint = text_of(read_object(folder / "data.json").get("fingerprint"))
    if not config:
        run.missing.append(NOT_STARTED)
    elif not run.figures or run.figures.get("step") != steps:
        last = max((_number(row.get("step")) or 0 for row in rows), default=0)
        run.missing.append(f"pre-training has not ended: step {last:,.0f} of {steps or 0:,.0f}")
        run.figures = {}
    elif "eval_loss" not in run.figures:
        run.missing.append("summary.json has no held-out loss")
    for path in sorted((folder / "evaluations").glob("length-*.json")):
        found = read_object(path)
        length, loss = _number(found.get("length")), _number(found.get("loss"))
        if length and (loss is not None or found.get("applicable") is False):
            run.lengths[int(length)] = loss if found.get("applicable") is True else None
    return run


def _expect(run: Run, root: pathlib.Path, job: dict[str, Any]) -> None:
    """Notes which stages of a sweep's run are missing, and why if it is known."""
    run.planned = True
    run.stages = tuple(f"{run.folder.name}-{pathlib.Path(str(stage)).name}" for stage in _list(job.get("stages")))
    status = read_object(root / "status" / f"{pathlib.Path(run.name).name}.json")
    if status.get("state") == "failed" and not (run.figures and status.get("stage") == "pretrain"):
        run.missing = [text for text in run.missing if text != NOT_STARTED]
        run.missing.insert(0, f"{text_of(status.get('stage'))} failed: {text_of(status.get('error'), 300)}")
    begun = NOT_STARTED not in run.missing  # else that says it all
    for stage in _list(job.get("stages")) if begun else ():
        tuned = run.folder.with_name(f"{run.folder.name}-{pathlib.Path(str(stage)).name}")
        evaluated = any((run.folder / "evaluations").glob("*"))
        found = evaluated if stage == "evaluate" else (tuned / "results.json").exists()
        if stage != "pretrain" and not found and (run.figures or stage != "evaluate"):
            run.missing.append(f"{text_of(stage)}: no results yet")


def _attach(folder: pathlib.Path, config: dict[str, Any], runs: Sequence[Run]) -> None:
    """Adds what a fine-tuning found to the run it started from; moved folders are found by their names."""
    source = pathlib.Path(str(config.get("init_from", ""))).name
    fitting = [run for run in runs if run.folder.name == source]
    beside = [run for run in fitting if run.folder.parent == folder.parent] or fitting
    if not beside:
        return
    run = beside[0]
    for task_name, found in read_object(folder / "results.json").items():
        task = TASKS.get(task_name)
        if task is None or not task.main:
            continue
        metric = task.main + task.splits[0].removeprefix("validation")
        values = [value for raw in _list(_dict(found).get(metric)) if (value := _number(raw)) is not None]
        if task.name in run.tasks:
            run.left_out.append(f"{task.name} of {text_of(folder.name)}")
            continue
        if values:
            run.tasks[task.name] = values
        _count_labels(run, task.name, folder / "tasks" / task.name, task.splits[0])


def _count_labels(run: Run, task: str, folder: pathlib.Path, split: str) -> None:
    totals: dict[int, tuple[int, int]] = {}
    for path in sorted(folder.glob("*.json")):
        counts = _dict(_dict(read_object(path).get("by_label")).get(split))
        for label, pair in counts.items():
            numbers = [_number(value) for value in _list(pair)]
            if re.fullmatch(r"-?\d{1,6}", label) and len(numbers) == 2 and None not in numbers:
                rows, hits = totals.get(int(label), (0, 0))
                totals[int(label)] = (rows + int(numbers[0] or 0), hits + int(numbers[1] or 0))
    if totals:
        run.by_label[task] = dict(sorted(totals.items()))


def _told_apart(groups: dict[str, list[Run]]) -> tuple[dict[str, list[Run]], dict[str, list[str]]]:
    """Runs of one name but different settings, or twice the same seed, become variants of their own.

    They are named by the folders that their run folders are in, where that tells them apart, else by these. Returns the
    variants, and the new names by the old one.
    """
    found: dict[str, list[Run]] = {}
    split: dict[str, list[str]] = {}
    for name, group in groups.items():
        if _is_one(group):
            found[name] = group
            continue
        places: dict[pathlib.Path, list[Run]] = {}
        for run in group:
            places.setdefault(run.folder.parent, []).append(run)
        several = len(places) > 1 and all(map(_is_one, places.values()))
        unique = len({place.name for place in places}) == len(places)
        for run in group:
            place = run.folder.parent if several else run.folder
            same = not unique if several else sum(other.folder.name == run.folder.name for other in group) > 1
            run.variant = f"{name} ({text_of(str(place) if same else place.name)})"
            found.setdefault(run.variant, []).append(run)
            if run.variant not in split.setdefault(name, []):
                split[name].append(run.variant)
    return found, split


def _is_one(group: Sequence[Run]) -> bool:
    """Whether these are seeds of one variant."""
    settings = {json.dumps(settings_of(run.config), sort_keys=True, default=str) for run in group if run.config}
    return len(settings) <= 1 and len({run.seed for run in group}) == len(group)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same variant: everything but the seed, the name and the place."""
    flat = flatten(config)
    return {key: flat[key] for key in flat if not any(key == p or key.startswith(p + ".") for p in PLACES)}


def _note_tasks(groups: dict[str, list[Run]]) -> None:
    """A task or a length that some runs of a sweep have is missing in its others.

    Of a run alone nobody asked for more than there is; but of several tasks one may still be at work.
    """
    known = [task for task in TASKS if any(task in run.tasks for group in groups.values() for run in group)]
    lengths = sorted({length for group in groups.values() for run in group if run.planned for length in run.lengths})
    for group in groups.values():
        for run in group:
            lacking = [task for task in known if task not in run.tasks]
            if lacking and run.figures and (run.planned or run.tasks):
                run.missing.append(f"no results of {', '.join(lacking)}")
            at = [str(length) for length in lengths if length not in run.lengths]
            if at and run.figures and run.planned:
                run.missing.append(f"not evaluated at length {', '.join(at)}")


# --- JSON that may be anything ---


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        value = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _code(start: dict[str, Any]) -> str:
    """The code of a start; a commit says all, unless its files had been changed."""
    commit, digest = text_of(start.get("commit")), text_of(start.get("code"))
    return commit if commit and not commit.endswith(CHANGED) else f"{commit} ({digest})" if commit else digest


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def text_of(value: Any, longest: int = LONGEST) -> str:
    """A string on one line without control characters, cut where it is long; '' for anything else."""
    if not isinstance(value, str):
        return ""
    line = "".join(letter if letter.isprintable() else " " for letter in value)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


__all__ = ["Comparison", "Run", "UserError", "collect", "read_object", "settings_of", "text_of"]
