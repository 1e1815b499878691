"""The report's pictures, as data URIs: variants told apart by marker and dashes as well as by colour."""

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure

from convattn_jax.inference import AttentionMaps
from convattn_jax.plots import DIVERGING, FAINT, INK, NAMES, SOFT, Kernel
from convattn_jax.report.tables import Measure
from convattn_jax.statistics import Interval
from convattn_jax.taps import FLAT, centred

WIDTH = 4.6  # inches: as wide as a phone shows without loss
LONGEST_OF_TWO = 24  # characters of a name, where the legend has two columns
COLOURS = ("#1f6fb4", "#d9601a", "#2a8f5b", "#8a4fbf", "#b8860b", "#c2376f", "#3b3f46", "#4aa3a2")
MARKERS = "osD^vPX*<>ph"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 2, 2)))
MOST_LAYERS, MOST_HEADS = 4, 4  # of attention maps that are drawn

Curve = Sequence[tuple[float, float]]


class Drawing(NamedTuple):
    """A data URI, and its size in pixels as the page shows it."""

    uri: str
    width: int
    height: int


def style(index: int) -> dict[str, Any]:
    """Of the index-th variant, the same in every picture; 8, 12 and 5 repeat together after 120."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def lines(
    curves: Mapping[str, Curve], styles: Mapping[str, int], x: str, y: str, level: float | None = None
) -> Drawing:
    """One line a variant, with few markers; the legend below is in the order of the lines' ends."""
    ends = sorted((name for name in curves if curves[name]), key=lambda name: -curves[name][-1][1])
    columns = 2 if max(map(len, ends), default=0) <= LONGEST_OF_TWO else 1
    rows = -(-len(ends) // columns)
    height = 3.0 + 0.165 * rows

    def draw(figure: Figure) -> None:
        axes: Any = figure.add_axes((0.12, (0.6 + 0.165 * rows) / height, 0.85, 2.15 / height))
        for name in ends:
            points = np.asarray(curves[name], np.float64)
            every = max(1, len(points) // 6)
            axes.plot(*points.T, **style(styles[name]), markevery=every, ms=4.5, linewidth=1.5, label=name)
        if level is not None:
            axes.axhline(level, color=SOFT, linewidth=0.8)
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_xlabel(x, fontsize=8.5, color=SOFT)
        axes.set_title(y, fontsize=8.5, color=SOFT, loc="left")
        axes.tick_params(labelsize=8, length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
        figure.legend(
            loc="lower left", bbox_to_anchor=(0.02, 0.0), ncols=columns, fontsize=8, frameon=False, handlelength=3.2
        )

    return _drawn(draw, WIDTH, height)


def intervals(found: Mapping[str, Interval], measure: Measure, baseline: str) -> Drawing:
    """A row a variant: the mean difference as a dot, its interval as a bar."""
    height = 0.75 + 0.27 * len(found)

    def draw(figure: Figure) -> None:
        axes: Any = figure.add_axes((0.42, 0.45 / height, 0.55, (height - 0.6) / height))
        axes.axvline(0, color=SOFT, linewidth=0.8)
        for row, one in enumerate(found.values()):
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [row, row], color=INK, linewidth=1.6)
            filled = INK if one.excludes_zero else "white"
            axes.plot(one.mean, row, "o", ms=6, markerfacecolor=filled, markeredgecolor=INK)
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        better = "less is better" if measure.sign < 0 else "more is better"
        axes.set_xlabel(f"{measure.name}: variant − {baseline} ({better})", fontsize=8.5, color=SOFT, x=0.2)

    return _drawn(draw, WIDTH, height)


def kernels(terms: Mapping[str, Kernel], limit: float) -> Drawing:
    """A strip a term: a row a head, layers from top to bottom; + and − mark each head's strongest tap."""
    layers, heads, _ = next(iter(terms.values())).mean.shape
    rows = layers * heads
    height = 0.75 + max(0.9, min(4.2, 0.16 * rows))

    def draw(figure: Figure) -> None:
        for index, (name, kernel) in enumerate(terms.items()):
            taps = centred(kernel.mean).reshape(rows, -1)
            n = taps.shape[1] // 2
            left, width = 0.16 + index * 0.84 / len(terms), 0.84 / len(terms) - 0.06
            axes: Any = figure.add_axes((left, 0.32 / height, width, (height - 0.6) / height))
            axes.imshow(
                taps, cmap=DIVERGING, norm=Normalize(-limit, limit), aspect="auto", interpolation="nearest",
                extent=(-n - 0.5, n + 0.5, rows - 0.5, -0.5),
            )  # fmt: skip
            for row, values in enumerate(taps):
                tap = int(np.abs(values).argmax())
                if abs(values[tap]) >= FLAT:
                    colour = "white" if abs(values[tap]) > 0.45 * limit else INK
                    axes.plot(tap - n, row, "+" if values[tap] > 0 else "_", color=colour, ms=4, mew=0.9)
            axes.set_yticks([layer * heads + (heads - 1) / 2 for layer in range(layers)] if index == 0 else [])
            if index == 0:
                axes.set_yticklabels([f"layer {layer + 1}" for layer in range(layers)])
            for layer in range(1, layers):
                axes.axhline(layer * heads - 0.5, color=INK, linewidth=0.5)
            axes.set_xticks([-n, 0, n], [f"≤−{n}", "0", f"≥{n}"])
            axes.tick_params(labelsize=7, length=0)
            axes.set_title(NAMES.get(name, name), fontsize=8, color=INK)

    return _drawn(draw, 3.6, height, "png")


def attention(found: AttentionMaps) -> Drawing:
    """Who looks at whom: a row a layer, a column a head, queries down, keys across, darker for more."""
    layers, heads, size, _ = found.weights.shape
    down = [int(i) for i in np.unique(np.linspace(0, layers - 1, min(layers, MOST_LAYERS)).round())]
    across = list(range(min(heads, MOST_HEADS)))
    panel = 1.45 if len(across) <= 2 else 1.05
    left, below, above = 0.75, 0.65, 0.3
    width = left + len(across) * (panel + 0.08)
    height = above + len(down) * (panel + 0.08) + below

    def draw(figure: Figure) -> None:
        for row, column in itertools.product(range(len(down)), range(len(across))):
            top = above + row * (panel + 0.08)
            box = ((left + column * (panel + 0.08)) / width, 1 - (top + panel) / height, panel / width, panel / height)
            axes: Any = figure.add_axes(box)
            axes.imshow(found.weights[down[row], across[column]], cmap="gray_r", norm=PowerNorm(0.5, 0, 1))
            axes.spines[:].set(color=FAINT, linewidth=0.6)
            ticks = range(size)
            axes.set_yticks(ticks if column == 0 else [], found.tokens if column == 0 else [])
            axes.set_xticks(ticks if row == len(down) - 1 else [], found.tokens if row == len(down) - 1 else [])
            axes.tick_params(labelsize=max(3.0, min(7.0, 62 * panel / size)), length=0, pad=1.5)
            axes.tick_params(axis="x", labelrotation=90)
            if row == 0:
                axes.set_title(f"head {across[column] + 1}", fontsize=7.5, color=SOFT, pad=2)
            if column == len(across) - 1:
                axes.yaxis.set_label_position("right")
                axes.set_ylabel(f"layer {down[row] + 1}", fontsize=7.5, color=SOFT, labelpad=1)

    return _drawn(draw, width + 0.2, height, "png")


def _drawn(draw: Callable[[Figure], None], width: float, height: float, form: str = "svg") -> Drawing:
    """The picture; names are drawn as they are, not as formulas."""
    with matplotlib.rc_context(
        {"text.parse_math": False, "svg.hashsalt": "report", "axes.unicode_minus": True, "svg.fonttype": "none"}
    ):
        figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
        draw(figure)
        content = io.BytesIO()
        nothing = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(content, format=form, metadata=nothing)
    if form == "png":  # few colours: a palette takes a third of the bytes
        colours = PIL.Image.open(content).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
        content = io.BytesIO()
        colours.save(content, format=form, optimize=True)
    kind = "svg+xml" if form == "svg" else form
    uri = f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
    return Drawing(uri, round(96 * width), round(96 * height))
