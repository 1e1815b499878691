"""From a sweep to its jobs: each a run folder and the commands that fill it, checked before the first one starts."""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from convattn_jax.config import UserError, check, from_config, parse, to_plain
from convattn_jax.data import textfiles
from convattn_jax.effect import check_effect, check_source, without_effect
from convattn_jax.evaluate import Wanted
from convattn_jax.finetune import FinetuneConfig, check_positions, check_settings
from convattn_jax.glue import tsv
from convattn_jax.glue.tasks import select
from convattn_jax.pretrain import PretrainConfig
from convattn_jax.run import RunFolder, read_json
from convattn_jax.sweep.table import EVALUATE, PRETRAIN, Changes, Finetuning, Sweep, Variant

OWN = ("name", "seed", "init_from", "task")  # keys that the sweep itself sets


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a job, `python -m MODULE ARGS`, and whether its folder holds all that it is to leave there."""

    name: str
    module: str
    args: tuple[str, ...]
    folder: pathlib.Path
    is_done: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Job:
    """One variant with one seed: its stages, in order; `steps` are those of pre-training."""

    variant: str
    seed: int
    folder: pathlib.Path
    steps: int
    stages: tuple[Stage, ...]
    idle: Mapping[str, str] = dataclasses.field(default_factory=dict)  # keys that its model makes no use of

    @property
    def name(self) -> str:
        """That of its run folder."""
        return self.folder.name

    def open_stages(self) -> list[Stage]:
        """What is left to do; pre-training too where a later stage wants its last checkpoint and that is gone."""
        left = [stage for stage in self.stages if not stage.is_done()]
        first, end = self.stages[0], self.folder / "checkpoints" / str(self.steps)
        if left and left[0] is not first and not end.exists():
            left.insert(0, dataclasses.replace(first, is_done=end.exists))
        return left


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line adds to a sweep: names to keep, seeds, KEY -> text of pre-training and fine-tuning."""

    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    finetune: Mapping[str, str] = dataclasses.field(default_factory=dict)


def jobs(sweep: Sweep, workdir: pathlib.Path, options: Options) -> list[Job]:
    """All jobs, each variant's first seed before any second one.

    Raises:
      UserError: an entry is invalid; the line begins with its name.
    """
    names = [variant.name for variant in sweep.variants]
    for name in options.only:
        check(name in names, f"--only={name} is no variant of this sweep; there are: {', '.join(names)}")
    _check_free(options.config, "config", [variant.changes for variant in sweep.variants])
    _check_free(options.finetune, "finetune", [])
    for key in () if sweep.finetunings else options.finetune:
        raise UserError(f"--finetune.{key}: this sweep has no fine-tunings: leave it out")
    wanted = [variant for variant in sweep.variants if variant.name in (options.only or names)]
    seeds = {variant.name: options.seeds or variant.seeds or sweep.seeds for variant in wanted}
    deepest = max(len(given) for given in seeds.values())
    found = [
        _job(sweep, variant, seeds[variant.name][turn], workdir, options)
        for turn in range(deepest)
        for variant in wanted
        if turn < len(seeds[variant.name])
    ]
    for key in options.config:
        needed = [job.idle.get(key) for job in found]
        check(
            not all(needed),
            f"--config.{key} has no effect on {', '.join(variant.name for variant in wanted)}: leave it out, or choose "
            f"{needed[0]}",
        )
    return found


def _check_free(given: Mapping[str, str], option: str, taken: Sequence[Changes]) -> None:
    for key in given:
        check(key not in OWN, f"--{option}.{key}: a sweep sets this itself")
        check(
            all(key not in changes for changes in taken),
            f"--{option}.{key} is what the variants of this sweep differ in: leave it out",
        )


def _job(sweep: Sweep, variant: Variant, seed: int, workdir: pathlib.Path, options: Options) -> Job:
    folder = workdir / f"{variant.name}-{seed}"
    try:
        changes = {**sweep.changes, **variant.changes, "name": folder.name, "seed": seed, **options.config}
        args, config = _command(variant.config, folder, changes)
        c = from_config(PretrainConfig, config)
        check_effect(c.model, variant.changes)
        check_source(c.data.source, changes.keys())
        idle = without_effect(c.model, changes)  # said of all variants, meant for those that make use of it
        if idle:
            args, config = _command(variant.config, folder, {k: v for k, v in changes.items() if k not in idle})
            c = from_config(PretrainConfig, config)
        RunFolder(folder).check_belongs(to_plain(c))
        if c.data.source == "text":
            textfiles.find(c.data.files, "data.files")
            textfiles.find(c.data.heldout_files, "data.heldout_files")
        stages = [Stage(PRETRAIN, "convattn_jax.main", args, folder, lambda: _is_trained(folder, c.train.steps))]
        wanted = Wanted(sweep.lengths, (sweep.sentence,) if sweep.sentence else ())
        if wanted.lengths or wanted.sentences:
            stages.append(_evaluation(wanted, folder))
        stages += [_finetuning(finetuning, folder, c, options) for finetuning in sweep.finetunings]
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from error
    return Job(variant.name, seed, folder, c.train.steps, tuple(stages), idle)


def _command(spec: str, folder: pathlib.Path, changes: Changes) -> tuple[tuple[str, ...], ConfigDict]:
    """The arguments of `convattn_jax.main`, and the configuration that they come to."""
    overrides = (f"--config.{key}={_as_text(value)}" for key, value in changes.items())
    args = (f"--config={spec}", f"--workdir={folder}", _cache(folder), *overrides)
    return args, parse(["sweep", *args]).config


def _cache(folder: pathlib.Path) -> str:
    """The option that has all stages of all jobs share their compiled programs."""
    return f"--compile_cache={folder.parent / 'compiled'}"


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) and value else str(value)


def _is_trained(folder: pathlib.Path, steps: int) -> bool:
    summary = _read(folder / "summary.json")
    return summary.get("step") == steps


def _evaluation(wanted: Wanted, folder: pathlib.Path) -> Stage:
    lengths = [f"--lengths={','.join(map(str, wanted.lengths))}"] if wanted.lengths else []
    args = (f"--run={folder}", _cache(folder), *lengths, *(f"--sentence={text}" for text in wanted.sentences))

    def is_done() -> bool:
        left = wanted.missing(folder)
        return not (left.lengths or left.sentences)

    return Stage(EVALUATE, "convattn_jax.evaluate", args, folder, is_done)


def _finetuning(finetuning: Finetuning, run: pathlib.Path, pretraining: PretrainConfig, options: Options) -> Stage:
    folder = run.with_name(f"{run.name}-{finetuning.name}")
    changes = {**finetuning.changes, **options.finetune, "init_from": run}
    try:
        args, config = _command(finetuning.config, folder, changes)
    except UserError as error:
        raise UserError(str(error).replace("--config.", "--finetune.")) from error  # as the sweep's user wrote it
    c = from_config(FinetuneConfig, config)
    tasks = [task for task in select(c.glue.tasks) if not task.predicted_by]
    check_positions(c.glue, tasks, pretraining.model)
    check_settings(RunFolder(folder), c)
    if c.glue.source == "tsv":
        for task in tasks:
            if not task.is_probe:
                tsv.check_there(c.glue.data_dir, task)

    def is_done() -> bool:
        finished = [folder / "tasks" / task.name / f"{seed}.json" for task in tasks for seed in c.glue.seeds_of(task)]
        found = _read(folder / "results.json")
        return all(path.exists() for path in finished) and all(task.name in found for task in tasks)

    return Stage(finetuning.name, "convattn_jax.main", args, folder, is_done)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        return read_json(RunFolder(path.parent).path / path.name)
    except UserError:
        return {}


# --- what the report wants to know ---


def write_plan(sweep: Sweep, planned: Sequence[Job], workdir: pathlib.Path) -> None:
    """Writes sweep.json: baseline, variants and jobs, beside those of earlier calls."""
    folder = RunFolder(workdir)
    before = _read(workdir / "sweep.json")
    entries = {
        job.name: {"variant": job.variant, "seed": job.seed, "stages": [stage.name for stage in job.stages]}
        for job in planned
    }
    names = [variant.name for variant in sweep.variants]
    variants = names + [name for name in before.get("variants", []) if name not in names]
    jobs_of = {**before.get("jobs", {}), **entries}
    folder.write(
        "sweep", {"baseline": sweep.baseline, "sentence": sweep.sentence, "variants": variants, "jobs": jobs_of}
    )


def as_text(job: Job) -> str:
    """The commands of a job, as they would be typed."""
    return "\n".join(shlex.join(["python", "-m", stage.module, *stage.args]) for stage in job.stages)
