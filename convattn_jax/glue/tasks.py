"""The tasks and their training recipes, as literal tables; the facts of GLUE (Wang et al. 2019) stand only here."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from convattn_jax.config import UserError, check, check_choice


@dataclasses.dataclass(frozen=True)
class ServerFile:
    """A file of a submission: its name, and how many rows the GLUE server expects in it."""

    name: str
    rows: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      texts: one or two text fields, as TFDS names them.
      labels: the classes, in the order of our class numbers; none for a regression.
      metrics: what is computed, names of `metrics.METRICS`.
      main: the metric that a best seed is chosen by, on the first of `splits`.
      splits: the splits with labels that are evaluated.
      server: what the GLUE server wants of each test split.
      folder: the task's folder in the original layout, '' for a probing task.
      columns: the text fields' names in the header of the original files.
      label: the label's name there.
      numbered: whether files and server write a class as its number, not as its name.
      train_rows: size of the full training set; 0 where there is none or it depends on the text.
      starts_from: the task whose fine-tuned encoder training starts from, '' for the pre-trained one.
      predicted_by: the task whose model predicts this one.
      broken_rows: whether the full files have lines with too few columns, which are to be left out.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    main: str
    splits: tuple[str, ...] = ("validation",)
    server: Mapping[str, ServerFile] = dataclasses.field(default_factory=dict)
    folder: str = ""
    columns: tuple[str, ...] = ("sentence1", "sentence2")
    label: str = "label"
    numbered: bool = False
    train_rows: int = 0
    starts_from: str = ""
    predicted_by: str = ""
    broken_rows: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether labels are scores."""
        return not self.labels

    @property
    def is_probe(self) -> bool:
        """Whether the rows are made from the run's own held-out text."""
        return not self.folder

    @property
    def tests(self) -> tuple[str, ...]:
        """The splits whose labels only the server knows."""
        return tuple(self.server)

    @property
    def outputs(self) -> int:
        """How many numbers the head puts out for a row."""
        return max(1, len(self.labels))


_PAIR = ("sentence1", "sentence2")
_INFERENCE = ("entailment", "not_entailment")
_THREE_WAY = ("contradiction", "entailment", "neutral")  # the reference's order; TFDS has another

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mnli", ("premise", "hypothesis"), _THREE_WAY, ("accuracy",), "accuracy",
             splits=("validation_matched", "validation_mismatched"), folder="MNLI", label="gold_label",
             train_rows=392_702,
             server={"test_matched": ServerFile("MNLI-m.tsv", 9796),
                     "test_mismatched": ServerFile("MNLI-mm.tsv", 9847)}),
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), "matthews", folder="CoLA",
             server={"test": ServerFile("CoLA.tsv", 1063)}, columns=("sentence",), numbered=True, train_rows=8551),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), "accuracy", folder="SST-2",
             server={"test": ServerFile("SST-2.tsv", 1821)}, columns=("sentence",), numbered=True, train_rows=67_349),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "accuracy", folder="MRPC",
             server={"test": ServerFile("MRPC.tsv", 1725)}, columns=("#1 String", "#2 String"), label="Quality",
             numbered=True, train_rows=3668, starts_from="mnli"),
        Task("stsb", _PAIR, (), ("pearson", "spearman"), "spearman", folder="STS-B",
             server={"test": ServerFile("STS-B.tsv", 1379)}, label="score", train_rows=5749, starts_from="mnli"),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), "accuracy",
             folder="QQP", server={"test": ServerFile("QQP.tsv", 390_965)}, columns=("question1", "question2"),
             label="is_duplicate", numbered=True, train_rows=363_849, broken_rows=True),
        Task("qnli", ("question", "sentence"), _INFERENCE, ("accuracy",), "accuracy", folder="QNLI",
             server={"test": ServerFile("QNLI.tsv", 5463)}, columns=("question", "sentence"), train_rows=104_743),
        Task("rte", _PAIR, _INFERENCE, ("accuracy",), "accuracy", folder="RTE",
             server={"test": ServerFile("RTE.tsv", 3000)}, train_rows=2490, starts_from="mnli"),
        Task("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",), "accuracy", folder="WNLI",
             server={"test": ServerFile("WNLI.tsv", 146)}, numbered=True, train_rows=635),
        Task("ax", ("premise", "hypothesis"), _THREE_WAY, (), "", splits=(), folder="AX",
             server={"test": ServerFile("AX.tsv", 1104)}, predicted_by="mnli"),
        Task("word_order", ("sentence",), ("in_order", "swapped"), ("accuracy",), "accuracy"),
        Task("adjacent", _PAIR, ("apart", "adjacent"), ("accuracy",), "accuracy"),
        Task("distance", ("sentence",), (), ("pearson", "spearman"), "spearman"),
    )
}  # fmt: skip
OUTPUTS = max(task.outputs for task in TASKS.values())  # of a head that serves every task
GLUE: tuple[str, ...] = tuple(name for name, task in TASKS.items() if not task.is_probe)
PROBES: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.is_probe)


def select(names: Iterable[str]) -> tuple[Task, ...]:
    """The named tasks, each once, in the table's order.

    Raises:
      UserError: no name, or one that no task has.
    """
    names = tuple(names)
    check(bool(names), f"glue.tasks is empty: name some of {', '.join(TASKS)}")
    for name in names:
        check_choice("glue.tasks", name, TASKS)
    return tuple(task for name, task in TASKS.items() if name in names)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one task is trained: AdamW with linear warm-up and decay.

    Attributes:
      steps: on the full training set, 0 where `epochs` decides.
      epochs: passes over the training set, 0 where `steps` decides.
      warmup: share of the steps in which the rate rises.
      length: longest row, in tokens.
    """

    steps: int
    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float
    length: int = 128


def _recipes(
    steps: Mapping[str, int], rate: float, warmup: float = 0.1, batch: int = 32, large: int = 32, **rates: float
) -> dict[str, Recipe]:
    return {
        task: Recipe(count, 0, large if task in ("mnli", "qqp") else batch, rates.get(task, rate), warmup)
        for task, count in steps.items()
    }


_ELECTRA_STEPS = {
    "mnli": 12121, "qqp": 11200, "cola": 851, "sst2": 6409, "mrpc": 343, "stsb": 1836, "qnli": 9835, "rte": 777,
    "wnli": 100,
}  # fmt: skip
_STABLE_EPOCHS = 20
_STABLE_STEPS_PER_EPOCH = {
    "mnli": 24243, "qqp": 22400, "cola": 567, "sst2": 4273, "mrpc": 229, "stsb": 367, "qnli": 6557, "rte": 155,
    "wnli": 100,
}  # fmt: skip
_STABLE_STEPS = {task: _STABLE_EPOCHS * steps for task, steps in _STABLE_STEPS_PER_EPOCH.items()}

PRESETS: dict[str, dict[str, Recipe]] = {
    "electra": _recipes(_ELECTRA_STEPS, 3e-4, large=128, qnli=1e-4),
    "electra_base": _recipes(_ELECTRA_STEPS, 1e-4, large=128),
    "stable": _recipes(_STABLE_STEPS, 2e-5, warmup=2 / _STABLE_EPOCHS, batch=16, large=16),
    "probe": {  # one rate for all sizes: batches of 16 at 5e-4 leave 12 layers at chance (docs/results.md)
        "word_order": Recipe(0, 8, 32, 2e-4, 0.1, length=32),
        "adjacent": Recipe(0, 8, 32, 2e-4, 0.1, length=64),
        "distance": Recipe(0, 8, 32, 2e-4, 0.1, length=32),
    },
}
GLUE_PRESETS: tuple[str, ...] = tuple(name for name in PRESETS if name != "probe")


def recipe(preset: str, task: Task) -> Recipe:
    """The recipe of a task: `preset` says it for GLUE, the probing tasks have one of their own whatever it says.

    Raises:
      UserError: an unknown preset.
      ValueError: a task that is not trained, but predicted by another's model.
    """
    check_choice("glue.preset", preset, GLUE_PRESETS)
    if task.predicted_by:
        raise ValueError(f"{task.name} is predicted by the model of {task.predicted_by} and has no training")
    return PRESETS["probe" if task.is_probe else preset][task.name]


def steps_for(task: Task, chosen: Recipe, train_rows: int) -> int:
    """Training steps: the recipe's on the full training set, as many epochs as those are on another size.

    A recipe of E epochs takes E * ceil(rows / batch) steps.

    Raises:
      UserError: there are no rows.
    """
    if train_rows < 1:
        raise UserError(f"glue.tasks={task.name}: there are no training rows; name a source that has some")
    if chosen.epochs:
        return chosen.epochs * math.ceil(train_rows / chosen.batch_size)
    return max(1, round(chosen.steps * train_rows / task.train_rows))
