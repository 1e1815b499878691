"""What is compared, as tables of text with a number to sort by; HTML and Markdown are made of the same ones."""

import collections
import dataclasses
import math
import statistics as stats
from collections.abc import Mapping, Sequence

from convattn_jax.console import human
from convattn_jax.glue.tasks import GLUE, PROBES, TASKS
from convattn_jax.report.runs import Comparison, settings_of
from convattn_jax.statistics import Interval, paired_interval

NOTHING = "—"
FARTHEST = 7  # words between the marked ones of the probe `distance`


@dataclasses.dataclass(frozen=True)
class Cell:
    """What stands there, and what it is sorted by (None: last)."""

    text: str
    value: float | str | None = None
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A heading, a sentence that says what the numbers are, columns and rows."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column: `sign` is +1 where more is better, -1 where less is, `scale` what it is shown in."""

    key: str
    name: str
    sign: int
    scale: float | int = 1
    digits: int = 3


def measures(c: Comparison) -> list[Measure]:
    """Everything that at least one run has a figure for, in the order of the columns."""
    tasks = [name for name in (*GLUE, *PROBES) if any(name in run.tasks for run in c.runs())]
    lengths = sorted({length for run in c.runs() for length in run.lengths})
    found = [Measure("eval_loss", "held-out loss", -1)]
    found += [Measure(f"length:{length}", f"loss at {length}", -1) for length in lengths]
    found += [Measure(f"task:{name}", task_name(name), 1, 100, 1) for name in tasks]
    return [m for m in found if any(c.values(name, m.key) for name in c.variants)]


def task_name(name: str) -> str:
    """A task with its metric: `cola (matthews)`."""
    return f"{name} ({TASKS[name].main})"


def difference(c: Comparison, variant: str, measure: Measure, other: str) -> Interval | None:
    """Of a variant to another, over the seeds that both have; None where there is none."""
    ours, theirs = c.values(variant, measure.key), c.values(other, measure.key)
    shared = sorted(ours.keys() & theirs.keys())
    return paired_interval([(ours[s] - theirs[s]) * measure.scale for s in shared]) if shared else None


# --- the tables ----------------------------------------------------------------------------------------------------


def overview(c: Comparison) -> Table:
    """The paper's layout: a row a variant."""
    tasks = [m for m in measures(c) if m.key.startswith("task:")]
    loss = Measure("eval_loss", "held-out loss", -1)
    glue = [m for m in tasks if TASKS[m.key[5:]].folder]
    columns = ["variant", "seeds", "held-out loss", "perplexity"]
    columns += [f"loss − {c.baseline}"] if c.baseline else []
    columns += [m.name for m in tasks] + (["GLUE mean"] if len(glue) > 1 else [])
    columns += ["parameters", "tokens/s", "peak memory"]
    rows = []
    for name, runs in c.variants.items():
        losses = list(c.values(name, loss.key).values())
        row = [Cell(name, name), Cell(_seeds(len(losses), len(runs)), float(len(losses)))]
        row += [_spread(losses, loss), _plain(math.exp(min(stats.mean(losses), 700)) if losses else None, "{:.1f}")]
        if c.baseline:
            row.append(_difference_cell(c, name, loss))
        row += [_task(c, name, m) for m in tasks]
        if len(glue) > 1:
            means = [stats.mean(c.values(name, m.key).values()) for m in glue if c.values(name, m.key)]
            row.append(_plain(100 * stats.mean(means) if len(means) == len(glue) else None, "{:.1f}"))
        row += [
            _human(c, name, "parameters"),
            _human(c, name, "tokens_per_second"),
            _human(c, name, "peak_memory", "B"),
        ]
        rows.append(row)
    signs = {"held-out loss": -1, "perplexity": -1, "GLUE mean": 1, **{m.name: 1 for m in tasks}}
    about = (
        "Loss in nats per predicted token of held-out text, the same masks for all. Behind ±: the standard deviation "
        "over pre-training seeds, or, marked °, over fine-tuning seeds where there is one pre-training. Tasks: main "
        "metric on the dev set in per cent, probes on their test rows, not the best seed but the mean. "
        "Bold: the best of a column, whatever its margin."
    )
    return Table("Variants", about, tuple(columns), _with_best(columns, rows, signs))


def differences(c: Comparison) -> Table:
    """Every measure of every variant against the baseline, with what the seeds could have shown."""
    rows = []
    for measure in measures(c):
        for name in c.variants:
            found = difference(c, name, measure, c.baseline) if c.baseline and name != c.baseline else None
            if found is not None:
                rows.append(_difference_row(name, measure, found))
    about = (
        f"Paired over pre-training seeds: variant − {c.baseline}, mean and 95 % interval of Student's t. Smallest "
        "detectable: the true difference that a two-sided t test of 5 % on as many seeds with this spread would find "
        "four times in five. No correction for the number of rows: one interval in twenty misses its truth."
    )
    columns = ("measure", "variant", "difference", "95 % interval", "n", "smallest detectable", "shown")
    return Table(f"Differences to {c.baseline}", about, columns, tuple(rows))


def _difference_row(name: str, measure: Measure, found: Interval) -> tuple[Cell, ...]:
    def signed(value: float | None) -> str:
        return NOTHING if value is None else _signed(value, measure.digits)

    word = "better" if found.mean * measure.sign > 0 else "worse"
    shown = "one seed" if found.n < 2 else word if found.excludes_zero else "not shown"
    interval = NOTHING if found.low is None else f"{signed(found.low)} … {signed(found.high)}"
    smallest = NOTHING if found.smallest is None else f"{found.smallest:.{measure.digits}f}"
    return (
        Cell(measure.name, measure.name), Cell(name, name), Cell(signed(found.mean), found.mean),
        Cell(interval, found.low), Cell(str(found.n), float(found.n)), Cell(smallest, found.smallest),
        Cell(shown, shown),
    )  # fmt: skip


def winners(c: Comparison) -> Table:
    """For every measure the best variant, the next, and whether the seeds tell them apart."""
    every = measures(c) + [Measure(f"distance:{d}", f"distance {d}, right", 1, 100, 1) for d in range(1, FARTHEST + 1)]
    every += [Measure("tokens_per_second", "tokens/s", 1, 1, 0), Measure("peak_memory", "peak memory, MB", -1, 1e-6, 0)]
    every += [Measure("parameters", "parameters", -1, 1, 0)]
    rows = []
    for measure in every:
        means = {n: stats.mean(v.values()) for n in c.variants if (v := c.values(n, measure.key))}
        ranked = sorted(means, key=lambda name: -measure.sign * means[name])
        if len(ranked) < 2:
            continue
        first, second = ranked[:2]
        found = difference(c, first, measure, second)
        told = (
            "no common seed" if found is None else "one seed" if found.n < 2 else "yes" if found.excludes_zero else "no"
        )
        if means[first] == means[second]:
            told = "equal"
        values = [f"{means[name] * measure.scale:,.{measure.digits}f}" for name in (first, second)]
        cells = (measure.name, first, values[0], second, values[1], told)
        rows.append(tuple(Cell(text, text) for text in cells))
    about = (
        "The best mean of each measure, whatever its margin, and the next best. Told apart: the paired 95 % interval "
        "of the two excludes zero; chosen after the fact, it promises less than its 95 %."
    )
    return Table(
        "Where each variant wins", about, ("measure", "best", "value", "next", "its value", "told apart"), tuple(rows)
    )


def distances(c: Comparison) -> Table:
    """The accuracy of the probe `distance` by how far apart the words are."""
    marks = [f"distance:{d}" for d in range(1, FARTHEST + 1)]
    rows = []
    for name in c.variants:
        values = [c.values(name, mark) for mark in marks]
        if any(values):
            cells = [_plain(100 * stats.mean(v.values()) if v else None, "{:.0f}") for v in values]
            rows.append((Cell(name, name), *cells))
    about = (
        "The probe “distance”: two words of a sentence are marked, 1 to 7 words apart, and the model says how far. "
        "Per cent of the test rows of each true distance whose prediction, taken to the nearest whole number, is "
        "right, over all seeds. A guess at random is right in 14 %; one that always says 4 is right at 4 alone."
    )
    return Table("Accuracy against word distance", about, ("variant", *(mark[9:] for mark in marks)), tuple(rows))


def lengths(c: Comparison) -> Table:
    """Held-out loss by the length of the rows."""
    found = sorted({length for run in c.runs() for length in run.lengths})
    rows = []
    for name, runs in c.variants.items():
        cells = []
        for length in found:
            cannot = any(length in run.lengths and run.lengths[length] is None for run in runs)
            values = list(c.values(name, f"length:{length}").values())
            cells.append(Cell("not applicable") if cannot else _spread(values, Measure("", "", -1)))
        rows.append((Cell(name, name), *cells))
    about = (
        "Held-out loss on rows of other lengths than the training's; masks and rows are the same for all variants of a "
        "length, and differ between lengths. Not applicable: position tables end where they were trained."
    )
    return Table(
        "Other lengths", about, ("variant", *(f"{length} tokens" for length in found)), tuple(rows) if found else ()
    )


def missing(c: Comparison) -> Table:
    """A row for each thing that is missing, with the runs that lack it."""
    lacking: dict[str, list[str]] = {}
    for run in c.runs():
        for text in run.missing:
            lacking.setdefault(text, []).append(run.name)
    rows = [(Cell(text, text), Cell(", ".join(names), names[0])) for text, names in lacking.items()]
    about = "Unfinished runs are in no mean above; what they lack shows there as a dash."
    return Table("What is missing", about, ("what", "of which runs"), tuple(rows))


def notes(c: Comparison) -> list[str]:
    """What a reader must know before comparing: where conditions are not equal, and on what the runs were made."""
    found = []
    settings: dict[str, dict[str, list[str]]] = {}
    for name, runs in c.variants.items():
        for key, value in (settings_of(runs[0].config) if runs[0].config else {}).items():
            if not key.startswith("model."):
                settings.setdefault(key, {}).setdefault(str(value)[:60], []).append(name)
    for key, by_value in settings.items():
        if len(by_value) > 1:
            parts = "; ".join(f"{value}: {', '.join(names)}" for value, names in by_value.items())
            found.append(f"The variants differ in {key} too ({parts}).")
    texts = {run.fingerprint for run in c.runs() if run.fingerprint}
    if len(texts) > 1:
        found.append("The runs were not made with the same token rows: their losses compare only if the held-out text "
                     "and the tokenizer are the same.")  # fmt: skip
    left_out = [one for run in c.runs() for one in run.left_out]
    if left_out:
        found.append(f"Not shown, since another fine-tuning stands for it: {', '.join(left_out)}.")
    machines = sorted({run.hardware for run in c.runs() if run.hardware})
    if machines:
        found.append(f"Hardware: {'; '.join(machines)}.")
    code = collections.Counter(run.code for run in c.runs() if run.curve)
    if any(code):
        told = [f"{name or 'not noted'} ({count})" for name, count in code.most_common()]
        found.append(f"Code (runs): {'; '.join(told)}." if len(code) > 1 else f"Code: {next(iter(code))}.")
    return found


# --- cells ---------------------------------------------------------------------------------------------------------


def _with_best(
    columns: Sequence[str], rows: list[list[Cell]], signs: Mapping[str, int]
) -> tuple[tuple[Cell, ...], ...]:
    for index, name in enumerate(columns):
        numbers = [cell.value for row in rows if isinstance(cell := row[index], Cell) and isinstance(cell.value, float)]
        if name in signs and len(set(numbers)) > 1:
            top = max(numbers, key=lambda value: value * signs[name])
            for row in rows:
                row[index] = dataclasses.replace(row[index], best=row[index].value == top)
    return tuple(map(tuple, rows))


def _seeds(done: int, planned: int) -> str:
    return str(done) if done == planned else f"{done} of {planned}"


def _spread(values: Sequence[float], measure: Measure, mark: str = "") -> Cell:
    if not values:
        return Cell(NOTHING)
    mean = stats.mean(values) * measure.scale
    text = f"{mean:.{measure.digits}f}"
    if len(values) > 1:
        text += f" ± {stats.stdev(values) * measure.scale:.{measure.digits}f}{mark}"
    return Cell(text, mean)


def _task(c: Comparison, name: str, measure: Measure) -> Cell:
    """Over pre-training seeds; with one of them, over its fine-tuning seeds."""
    values = list(c.values(name, measure.key).values())
    if len(values) == 1:
        task = measure.key[5:]
        tuned = next(run.tasks[task] for run in c.variants[name] if task in run.tasks and run.figures)
        return _spread(tuned, measure, "°")
    return _spread(values, measure)


def _difference_cell(c: Comparison, name: str, measure: Measure) -> Cell:
    found = difference(c, name, measure, c.baseline) if name != c.baseline else None
    if found is None:
        return Cell(NOTHING)
    text = _signed(found.mean, measure.digits)
    if found.low is not None and found.high is not None:
        text += f" [{_signed(found.low, measure.digits)}, {_signed(found.high, measure.digits)}]"
    return Cell(f"{text} n={found.n}", found.mean)


def _human(c: Comparison, name: str, key: str, unit: str = "") -> Cell:
    values = list(c.values(name, key).values())
    return (
        Cell(human(stats.median(values), " " if unit else "") + unit, stats.median(values)) if values else Cell(NOTHING)
    )


def _plain(value: float | None, form: str) -> Cell:
    return Cell(NOTHING) if value is None else Cell(form.format(value), value)


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")
