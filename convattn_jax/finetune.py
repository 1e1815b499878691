"""Fine-tuning: from a pre-trained run to a table of tasks and seeds, and a submission for the GLUE server.

A run folder of its own: `results.json` ({task: {metric: [one value a seed]}}), `statistics.json`, `results.md`,
`results.png`, `tasks/<task>/<seed>.json` (what each seed ended with), `checkpoints/<task>/<seed>/` (of the best seed,
and of every seed where another task starts from this one), `predictions/<task>-<split>.npz` (of the best seed) and the
submission. A killed run goes on with the tasks and seeds that are not finished; a later call may add others.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from convattn_jax import checkpoint, distributed, memory, origin
from convattn_jax.account import KINDS, Account
from convattn_jax.config import UserError, check, check_choice, flatten, from_config, to_plain
from convattn_jax.console import Console, duration
from convattn_jax.data import bucket
from convattn_jax.data.config import DataConfig
from convattn_jax.data.tokenizer import Tokenizer
from convattn_jax.glue import examples, finished, results, submission
from convattn_jax.glue.config import GlueConfig
from convattn_jax.glue.data import load_data
from convattn_jax.glue.task_run import EVALUATION_BATCH, TaskRun, classifier_of, edges_to
from convattn_jax.glue.tasks import OUTPUTS, TASKS, Task, recipe, select
from convattn_jax.glue.training import Trainer, make_compilers
from convattn_jax.inference import Pretrained, check_pretraining, load_run
from convattn_jax.model.config import ModelConfig
from convattn_jax.run import RunFolder
from convattn_jax.watchdog import WatchdogConfig, watched


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Everything a fine-tuning run is; `configs/glue.py` documents each key."""

    task: str
    name: str
    init_from: str
    glue: GlueConfig
    watchdog: WatchdogConfig

    def __post_init__(self):
        check(bool(self.init_from), "init_from is empty: name a pre-training run, such as runs/composite")


def default_workdir(config: ml_collections.ConfigDict) -> str:
    """Beside the run it starts from."""
    return f"{str(config.init_from).rstrip('/')}-glue"


def run(config: ml_collections.ConfigDict, workdir: str, console: Console | None = None) -> results.Table:
    """Trains what is not finished, and writes the results of all that is.

    Several processes train as one; the first of them looks into the folder, says what there is to do, and writes.
    """
    account = Account()
    distributed.check_same(distributed.code() | distributed.configuration(flatten(config)))
    first = distributed.first_process()
    with distributed.together():
        c = from_config(FinetuneConfig, config)
        pretrained = load_pretrained(c.init_from)
        tasks = [task for task in select(c.glue.tasks) if not task.predicted_by]
        check_positions(c.glue, tasks, pretrained.model.config)
        folder = RunFolder(workdir or default_workdir(config))
        settings = settings_of(c) | {
            "model": pretrained.config["model"],
            "tokenizer": pretrained.tokenizer.digest,
            "init_step": pretrained.step,
        }
        with bucket.explained("--workdir", folder.path):
            if first:
                check_start(folder, c.init_from, pretrained.step)
                folder.check_belongs(settings | _if_moved(folder, c.init_from))
                folder.check_writable()
        text = from_config(DataConfig, pretrained.config["data"], "data.")
        data = {task.name: load_data(task, c.glue, pretrained.tokenizer, text) for task in tasks}
        folder.path.mkdir(parents=True, exist_ok=True)
    start = checkpoint.digest(RunFolder(c.init_from).checkpoints, pretrained.step)
    distributed.check_same({"init_from": f"step {pretrained.step}, {start}", "tokenizer": pretrained.tokenizer.digest})
    if jax.process_count() > 1:
        distributed.check_same({f"rows of {name}": found.digest for name, found in data.items()})
    distributed.check_shared(folder.path)
    with console or Console(quiet=not first) as console, contextlib.ExitStack() as stack:
        with distributed.together():
            if first:
                stack.enter_context(folder.lock())
                pretrained.tokenizer.save(str(folder.path))
                folder.write("config", settings)
        steps = pretrained.config["train"]["steps"]
        if 0 < pretrained.step < steps:  # step 0 is of a run that was imported
            console.message(f"{c.init_from} has not ended: step {pretrained.step:,} of {steps:,} is the start")
        compilers = make_compilers()
        stack.callback(compilers.shutdown, cancel_futures=True)
        trainer = Trainer(classifier_of(pretrained.model.config, pretrained.tokenizer.size, OUTPUTS), compilers)
        with memory.explained(lambda: out_of_memory(c.glue)), watched(c.watchdog.frozen_seconds) as alive:
            finetunings = [
                TaskRun(c.glue, task, data[task.name], pretrained, trainer, folder, console, account, alive)
                for task in tasks
            ]
            training = [run.task.name for run in finetunings if run.missing()]
            if training and first:
                folder.started({"tasks": training, **origin.facts()})
            for finetuning in finetunings:  # the compiler is at work on later tasks while the first ones train
                finetuning.compile_ahead()
            for finetuning in finetunings:
                finetuning.complete()
        account.charge("evaluating")
        return distributed.from_first(lambda: finish(folder, console, account))


def settings_of(c: FinetuneConfig) -> dict[str, Any]:
    """What all results of a folder have in common."""
    settings = to_plain(c)
    for key in ("tasks", "together", "seeds", "save_seconds"):  # a later call may add to them
        settings["glue"].pop(key)
    return settings


def check_settings(folder: RunFolder, c: FinetuneConfig) -> None:
    """Raises a `UserError` where the folder was made with other settings, whatever the run they began from.

    Nor does it matter where that run lies: a folder may have been moved together with it.
    """
    stored = folder.read("config")
    if stored is not None:
        start = {key: stored[key] for key in ("init_from", "model", "tokenizer", "init_step") if key in stored}
        folder.check_belongs(settings_of(c) | start)


def _if_moved(folder: RunFolder, now: str) -> dict[str, Any]:
    """The place of the run that the folder was made from, if it is what lies at `now`: moved or copied with it."""
    before = str((folder.read("config") or {}).get("init_from", now))
    same_name = epath.Path(before).name == epath.Path(now).name
    there, here = RunFolder(before).read("config"), RunFolder(now).read("config")
    return {"init_from": before} if same_name and there in (None, here) else {}


def out_of_memory(c: GlueConfig) -> str:
    """What to set so that training needs less memory."""
    return (
        f"glue.together={c.together}: out of memory on {jax.devices()[0].device_kind}: set glue.together=1, or more "
        f"where it fits (seeds trained as one program; 0: as many as should fit), or lower glue.length={c.length}"
    )


def check_start(folder: RunFolder, init_from: str, step: int) -> None:
    """Raises a `UserError` where the folder holds results of another step of the run to start from."""
    before = (folder.read("config") or {}).get("init_step", step)
    check(
        before == step,
        f"{folder.path} was fine-tuned from step {before} of {init_from}, which now stands at step {step}: choose "
        "another --workdir, or delete that folder",
    )


def load_pretrained(path: str) -> Pretrained:
    """The run to start from.

    Raises:
      UserError: it is no pre-training run, its tokenizer is another's, or it holds no whole checkpoint.
    """
    folder = RunFolder(path)
    try:
        with bucket.explained("run folder", path):
            check_pretraining(path, folder.read("config"))
            began = folder.started_with()
        check(
            began is None or Tokenizer.load(str(folder.path)).digest == began["tokenizer"],
            f"{path}/tokenizer.model is not the tokenizer that its checkpoints were trained with: restore it",
        )
        return load_run(path)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


def check_positions(c: GlueConfig, tasks: Sequence[Task], model: ModelConfig) -> None:
    """Raises a `UserError` where rows may be longer than a model's absolute positions."""
    longest = max(c.length_of(task) for task in tasks)
    check(
        model.longest is None or longest <= model.longest,
        f"glue.length={c.length}: the run of init_from has absolute positions for {model.max_length} tokens only; "
        f"set glue.length={model.max_length}",
    )


def finish(folder: RunFolder, console: Console, account: Account) -> results.Table:
    """The results of what is finished, by this call or an earlier one, and a submission of what is predicted.

    The account is of this call alone.
    """
    table = finished.table(folder)
    results.write(folder.path, table)
    console.message(results.markdown(table).rstrip())
    names = {"results": "results.json", "table": "results.md", "picture": "results.png"}
    shown = [(label, folder.path / name) for label, name in names.items()]
    predictions = finished.predictions(folder)
    if predictions:
        shown.append(("submission", submission.write(folder.path, predictions).path))
    shown += [(KINDS[kind], duration(seconds)) for kind, seconds in account.seconds.items() if seconds]
    console.table(folder.path.name, shown)
    return table


class Label(NamedTuple):
    """What a classifier says of a text: the label (None for a regression) and all probabilities, or the score."""

    label: str | None
    probabilities: dict[str, float]
    score: float | None


def load_classifier(path: epath.PathLike, task: str) -> Callable[[Sequence[Any]], list[Label]]:
    """A function from sentences, or tuples of two, to labels with probabilities, by the best seed of a task.

    Raises:
      UserError: the folder is no fine-tuning run, or has no finished run of the task.
    """
    check_choice("task", task, TASKS)
    folder, row = RunFolder(path), TASKS[TASKS[task].predicted_by or task]
    config = folder.read("config")
    if config is None or config.get("task") != "finetune":
        raise UserError(f"{path} is no fine-tuning run: make one with configs/glue.py")
    tokenizer = Tokenizer.load(str(folder.path))
    check(
        tokenizer.digest == config["tokenizer"], f"{path}/tokenizer.model is not the tokenizer of this run: restore it"
    )
    trainer = Trainer(classifier_of(from_config(ModelConfig, config["model"], "model."), tokenizer.size, row.outputs))
    best = finished.params(folder, row, trainer.shapes(row.outputs), finished.best(folder, row))
    params = trainer.copies(best, 1)
    length = min(config["glue"]["length"], recipe(config["glue"]["preset"], row).length)
    edges = edges_to(length)

    def classify(texts: Sequence[Any]) -> list[Label]:
        check(not isinstance(texts, str), f"{task} wants a list of texts, not the one string {texts!r}: put it in [ ]")
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        for pair in pairs:
            fits = isinstance(pair, tuple | list) and [type(text) for text in pair] == [str] * len(row.texts)
            check(fits, f"{task} wants {len(row.texts)} text(s) an example ({', '.join(row.texts)}), not {pair}")
        pairs = list(map(tuple, pairs))
        rows = examples.encode(tokenizer, pairs, length)
        batch = min(EVALUATION_BATCH, 1 << max(0, len(rows) - 1).bit_length())  # few shapes are ever compiled
        logits = trainer.predict_alone(params, rows, edges, batch, tokenizer.pad)
        if row.is_regression:
            return [Label(None, {}, float(score)) for score in logits[:, 0]]
        exp = np.exp(logits - logits.max(1, keepdims=True))
        return [
            Label(row.labels[int(p.argmax())], dict(zip(row.labels, map(float, p), strict=True)), None)
            for p in exp / exp.sum(1, keepdims=True)
        ]

    return classify
