"""Draws docs/pictures/beyond.png and prints the tables of docs/beyond.md, from run folders.

for sweep in paper less radius; do tar xJf docs/runs/$sweep.tar.xz; done
python docs/draw_beyond.py paper less radius
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from convattn_jax.plots import DPI, FAINT, INK, LESS, MORE, SOFT, save
from convattn_jax.report.runs import Comparison, collect
from convattn_jax.statistics import Interval, paired_interval

PICTURE = pathlib.Path(__file__).parent / "pictures" / "beyond.png"
LONG = (
    *("t5", "fixed", "rope", "alibi", "composite+depthwise_query_key", "composite+depthwise_values"),
    *("dynamic", "composite", "shaw", "composite+depthwise_branch"),
)
TEXT = ("absolute", "fixed", "dynamic", "composite")
RADII = {2: "composite_r2", 4: "composite_r4", 8: "composite", 16: "composite_r16", 32: "composite_r32"}
NAMES = {
    "t5": "T5",
    "rope": "RoPE",
    "alibi": "ALiBi",
    "shaw": "Shaw",
    "composite+depthwise_query_key": "composite + query, key",
    "composite+depthwise_values": "composite + values",
    "composite+depthwise_branch": "composite + branch",
}
LOSS = "eval_loss"
Values = dict[int, float]


def interval(values: Values, baseline: Values) -> Interval:
    """Paired over the seeds that both have."""
    return paired_interval([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def told(found: Interval) -> str:
    """A difference with its 95 % interval and the smallest that would be found, or that there is none."""
    if found.low is None or found.high is None or found.smallest is None:
        return f"{found.mean:+.3f} (one seed)"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}; smallest found {found.smallest:.2f})"


def mean(values: Values) -> float:
    """Over seeds."""
    return sum(values.values()) / len(values)


def colour(name: str) -> str:
    """Composite attention blue, absolute positions orange, the rest grey."""
    return {"composite": MORE, "absolute": LESS}.get(name, SOFT)


def slopes(axes: Axes, ends: dict[str, tuple[Values, Values]], names: Sequence[str]) -> None:
    """A line a variant between two conditions, a dot a seed, the names at the right in the order of the lines."""
    for name, pair in ends.items():
        weight = 2.0 if name in ("composite", "absolute") else 1.1
        axes.plot([0, 1], [mean(values) for values in pair], color=colour(name), linewidth=weight, zorder=2)
        for place, values in enumerate(pair):
            seeds = list(values.values())
            axes.plot([place] * len(seeds), seeds, "o", ms=2.6, color=colour(name), zorder=3, clip_on=False)
    axes.set_xlim(-0.06, 1)
    axes.set_xticks([0, 1], list(names))
    axes.get_xticklabels()[1].set_horizontalalignment("right")
    low, high = axes.get_ylim()
    step, floor = 0.052 * (high - low), -np.inf
    for name, (_, last) in sorted(ends.items(), key=lambda item: mean(item[1][1])):
        floor = max(mean(last), floor + step)
        axes.annotate(
            f"{NAMES.get(name, name)}  {mean(last):.2f}",
            (1, mean(last)), xytext=(1.09, floor), va="center", fontsize=6.5, color=colour(name),
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6},
        )  # fmt: skip


def draw(paper: Comparison, less: Comparison, radius: Comparison) -> Figure:
    """Three panels: longer rows, less text, another radius."""
    figure = Figure(figsize=(9.0, 3.1), dpi=DPI, facecolor="white")
    figure.text(
        0.012, 0.95, "Held-out loss in nats per masked token; a dot is a pre-training", fontsize=7.5, color=SOFT
    )
    panels = [figure.add_axes((left, 0.13, width, 0.69)) for left, width in ((0.05, 0.16), (0.42, 0.16), (0.74, 0.25))]
    titles = ("trained at 128 tokens, read at 512", "a tenth of the text", "another radius")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9, color=INK, loc="left", weight="bold", pad=8)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.tick_params(length=0, labelsize=7, labelcolor=SOFT)
        axes.spines[:].set_visible(False)
    lengths = {name: (paper.values(name, "length:128"), paper.values(name, "length:512")) for name in LONG}
    slopes(panels[0], lengths, ("128", "512 tokens"))
    texts = {name: (paper.values(name, LOSS), less.values(name, LOSS)) for name in TEXT}
    slopes(panels[1], texts, ("all", "a tenth"))
    found = radii(paper, radius)
    axes = panels[2]
    places = range(len(found))
    axes.plot(places, [mean(values) for values in found.values()], color=MORE, linewidth=2)
    for place, values in zip(places, found.values(), strict=True):
        axes.plot([place] * len(values), list(values.values()), "o", ms=2.6, color=MORE)
    axes.set_xticks(places, [str(r) for r in found])
    axes.set_xlabel("farthest tap, tokens to each side", fontsize=7, color=SOFT)
    axes.set_ylim(3.02, 3.23)
    axes.set_yticks(np.arange(3.05, 3.21, 0.05))
    fixed = mean(paper.values("fixed", LOSS))
    axes.axhline(fixed, color=SOFT, linewidth=1.1, dashes=(4, 3))
    axes.annotate(
        f"fixed taps alone, radius 8  {fixed:.2f}", (4, fixed - 0.004), va="top", ha="right", fontsize=6.5, color=SOFT
    )
    return figure


def radii(paper: Comparison, radius: Comparison) -> dict[int, Values]:
    """Radius -> held-out loss by seed; the middle one is the paper sweep's composite."""
    return {r: (paper if name == "composite" else radius).values(name, LOSS) for r, name in RADII.items()}


def tables(paper: Comparison, less: Comparison, radius: Comparison) -> None:
    """What the page quotes."""
    print("512 tokens - 128 tokens")
    for name in LONG:
        short, long = paper.values(name, "length:128"), paper.values(name, "length:512")
        print(f"  {name:34} {mean(short):.3f} {mean(long):.3f}  {told(interval(long, short))}")
    print("variant - absolute, at a tenth of the text and at all of it; the lead lost between them")
    for name in TEXT[1:]:
        few, all_ = ((c.values(name, LOSS), c.values("absolute", LOSS)) for c in (less, paper))
        shared = sorted(set.intersection(*(set(values) for values in (*few, *all_))))
        lost = paired_interval([few[0][s] - few[1][s] - all_[0][s] + all_[1][s] for s in shared])
        print(f"  {name:10} {mean(few[0]):.3f} {told(interval(*few))}; {told(interval(*all_))}; {told(lost)}")
    print(f"  absolute   {mean(less.values('absolute', LOSS)):.3f}")
    for task in ("word_order", "adjacent", "distance"):
        values = [less.values(name, f"task:{task}") for name in ("composite", "absolute")]
        print(f"  {task}: {[round(100 * mean(v), 1) for v in values]}, {told(interval(*values))}")
    print("radius: loss, difference to radius 8")
    found = radii(paper, radius)
    for r, values in found.items():
        print(f"  {r:3} {mean(values):.3f} {told(interval(values, found[8])) if r != 8 else ''}")


def main(folders: Sequence[str]) -> None:
    """Reads the three sweeps and writes the picture."""
    if len(folders) != 3:
        sys.exit("python docs/draw_beyond.py PAPER LESS RADIUS: the folders of the three sweeps")
    paper, less, radius = (collect([folder]) for folder in folders)
    tables(paper, less, radius)
    save(draw(paper, less, radius), PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
