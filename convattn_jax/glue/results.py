"""From finished seeds to results.json, statistics.json, results.md and results.png."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from convattn_jax import plots
from convattn_jax.glue.tasks import TASKS
from convattn_jax.run import write_atomically

Table = Mapping[str, Mapping[str, Sequence[float]]]  # task -> metric -> one value a seed

COLOURS = ("#1f6fb4", "#d95f1e", "#4d4d4d", "#7a9a01")


def statistics(table: Table) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation (of a sample; 0 for one seed), median and best of each metric."""
    return {
        task: {
            metric: {
                "mean": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                "median": float(np.median(values)),
                "best": float(np.max(values)),
                "seeds": len(values),
            }
            for metric, values in metrics.items()
        }
        for task, metrics in table.items()
    }


def chance(task: str) -> float | None:
    """What a probe's guesses get: its classes are equally frequent, and a correlation is 0; None of other tasks."""
    row = TASKS.get(task)
    if row is None or not row.is_probe:
        return None
    return 0.0 if row.is_regression else 1 / len(row.labels)


def markdown(table: Table) -> str:
    """A row a metric: mean, spread, median, best, chance, number of seeds; in per cent, as GLUE is reported."""
    lines = ["| task | metric | mean | std | median | best | chance | seeds |", "|---|---|---|---|---|---|---|---|"]
    for task, metrics in statistics(table).items():
        guessed = chance(task)
        level = "—" if guessed is None else f"{100 * guessed:.1f}"
        for metric, s in metrics.items():
            values = " | ".join(f"{100 * s[name]:.1f}" for name in ("mean", "std", "median", "best"))
            lines.append(f"| {task} | {metric} | {values} | {level} | {s['seeds']} |")
    return "\n".join(lines) + "\n"


def write(folder: epath.Path, table: Table) -> None:
    """All four files; results.json holds the values and nothing else."""
    write_atomically(folder / "results.json", json.dumps({t: dict(m) for t, m in table.items()}, indent=2) + "\n")
    write_atomically(folder / "statistics.json", json.dumps(statistics(table), indent=2) + "\n")
    write_atomically(folder / "results.md", markdown(table))
    plot({folder.name: table}, folder / "results.png")


def load(folder: epath.PathLike) -> dict[str, dict[str, list[float]]]:
    """The results.json of a fine-tuning run."""
    return json.loads((epath.Path(folder) / "results.json").read_text())


def plot(runs: Mapping[str, Table], path: epath.PathLike) -> None:
    """Per task and metric the seeds as points, their mean as a line, chance as a dashed one; runs side by side."""
    names = list(dict.fromkeys((task, metric) for table in runs.values() for task in table for metric in table[task]))
    figure = Figure(figsize=(max(4.0, 1.1 * len(names) + 1.5), 3.4), dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    width = 0.8 / max(len(runs), 1)
    for index, (run, table) in enumerate(runs.items()):
        colour, offset = COLOURS[index % len(COLOURS)], (index - (len(runs) - 1) / 2) * width
        for place, (task, metric) in enumerate(names):
            values = [100 * value for value in table.get(task, {}).get(metric, ())]
            if values:
                x = place + offset
                axes.plot(x + np.linspace(-0.2, 0.2, len(values)) * width, values, "o", ms=4, color=colour, alpha=0.6)
                axes.hlines(np.mean(values), x - 0.4 * width, x + 0.4 * width, color=colour, linewidth=2)
        axes.plot([], [], "o-", color=colour, label=run)
    levels = [(place, level) for place, (task, _) in enumerate(names) if (level := chance(task)) is not None]
    for place, level in levels:
        axes.plot([place - 0.45, place + 0.45], [100 * level] * 2, "--", color="#808080", linewidth=1)
    if levels:
        axes.plot([], [], "--", color="#808080", linewidth=1, label="chance")
    axes.set_xticks(range(len(names)), [f"{task}\n{metric}" for task, metric in names], fontsize=8)
    axes.set_ylabel("per cent")
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if len(runs) > 1 or levels:
        axes.legend(frameon=False, fontsize=8)
    plots.save(figure, path)
