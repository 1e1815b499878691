"""The pictures of a run folder: the losses, and the convolutions that the attention heads have learned.

Only matplotlib's object interface is used (a `Figure` and its own canvas), never pyplot's global state, so that
pictures can be made from any thread and inside a notebook.
"""

import io
import os
import pathlib
import textwrap
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from convattn_jax.data import bucket, corpus
from convattn_jax.taps import FLAT, Kernel, census, centred, describe, signed

INK, SOFT, FAINT = "#1c2430", "#6a7280", "#dfe3e8"
MORE, LESS = "#1f6fb4", "#d9601a"  # blue draws attention, orange repels it: told apart with any colour vision
DIVERGING = LinearSegmentedColormap.from_list(
    "less_more", ["#8a3206", LESS, "#f6c9a8", "#ffffff", "#aed0ea", MORE, "#0b3c6b"]
)
WIDTH, DPI = 9.0, 200  # inches; 1800 pixels, shown at 900 in a README
BOLD = 0.64  # the mean width of a bold character, in font sizes
NAMES = {
    "fixed": "fixed kernel",
    "dynamic_query": "query-dynamic kernel",
    "dynamic_key": "key-dynamic kernel",
}


# --- the learned convolutions --------------------------------------------------------------------------------------


def plot_kernels(kernels: Mapping[str, Kernel], path: str | os.PathLike[str], title: str) -> bool:
    """Draws the kernels of each term: bars where there is room, one heat strip per layer where there are many.

    Args:
      kernels: term name -> taps; all terms have the same layers and heads.
      path: where the picture goes, written atomically.
      title: the heading.

    Returns:
      Whether there was anything to draw; without a term that has (finite) taps no picture is made.
    """
    terms = {
        name: Kernel(centred(kernel.mean), kernel.spread)
        for name, kernel in kernels.items()
        if kernel.mean.size and np.isfinite(kernel.mean).all()
    }
    if not terms:
        return False
    layers, heads, _ = next(iter(terms.values())).mean.shape
    beside = len(terms) * heads <= 8  # the terms stand beside each other; else below each other
    if heads <= 8 and layers * (1 if beside else len(terms)) <= 24:
        figure = _bars(terms, title, beside)
    else:
        figure = _strips(terms, title)
    save(figure, path)
    return True


class _Page:
    """A figure measured in inches from its top left corner, with a caption below `height`."""

    def __init__(self, height: float, caption: str = "") -> None:
        self.height = height + 0.13 * (1 + caption.count("\n")) + 0.22 if caption else height
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=DPI, facecolor="white")
        self.text(0.12, height + 0.1, caption, 6.2, SOFT, linespacing=1.45)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        box = (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        axes = self.figure.add_axes(box, facecolor="white")
        axes.tick_params(length=0, labelsize=6.5, labelcolor=SOFT, pad=2.5)
        axes.spines[:].set_visible(False)
        return axes

    def text(self, left: float, top: float, text: str, size: float | int, color: str = INK, **style: Any) -> None:
        self.figure.text(
            left / WIDTH, 1 - top / self.height, text, fontsize=size, color=color, **{"va": "top", **style}
        )


def _heading(page: _Page, title: str) -> None:
    page.text(0.12, 0.12, title, 12, weight="bold")
    what = "Added to the attention logits, by the key's place in tokens: − before the query, 0 itself, + after it"
    page.text(0.12, 0.38, what, 7.5, SOFT)
    page.text(WIDTH - 1.3, 0.38, "blue looks there", 7.5, MORE, weight="bold", ha="right")
    page.text(WIDTH - 0.15, 0.38, "orange avoids it", 7.5, LESS, weight="bold", ha="right")


def _caption(terms: Mapping[str, Kernel], extra: str) -> str:
    n = next(iter(terms.values())).mean.shape[-1] // 2
    text = (
        f"The outermost taps stand for all tokens {n} or more away, and zero is the mean of these two: the softmax "
        "ignores a constant, so only differences count. Sizes compare within a kind of kernel. "
        "+1 multiplies a token's attention weight by 2.7, +3 by 20. "
    )
    if any(name.startswith("dynamic") for name in terms):
        text += "A dynamic kernel depends on the token: this is the mean over held-out text. "
    return textwrap.fill(text + extra, 195)


def _bars(terms: Mapping[str, Kernel], title: str, beside: bool) -> Figure:
    """One small bar chart per head, one row of them per layer, the y axis shared within a term."""
    layers, heads, _ = next(iter(terms.values())).mean.shape
    columns = heads * (len(terms) if beside else 1)
    left, gap, between = 0.62, 0.12, 0.24
    width = (WIDTH - left - 0.15 - gap * (columns - 1) - (between if beside else 0) * (len(terms) - 1)) / columns
    width = min(width, 3.0)
    height = min(1.05, max(0.7, 0.62 * width))
    row, head, foot = height + 0.22, 0.6, 0.2
    block = head + layers * row + foot
    has_spread = any(kernel.spread is not None for kernel in terms.values())
    caption = _caption(terms, "Whiskers: one standard deviation over tokens." if has_spread else "")
    page = _Page(0.62 + block * (1 if beside else len(terms)), caption)
    for index, (name, kernel) in enumerate(terms.items()):
        x0 = left + (index * (heads * (width + gap) + between) if beside else 0)
        y0 = 0.62 + (0 if beside else index * block)
        page.text(x0, y0 + 0.06, NAMES.get(name, name), 9, weight="bold")
        limits = _limits(kernel, height)
        for layer in range(layers):
            top = y0 + head + layer * row
            if index == 0 or not beside:
                page.text(0.12, top + height / 2, f"layer {layer + 1}", 7, va="center")
            for h in range(heads):
                axes = page.axes(x0 + h * (width + gap), top, width, height)
                spread = None if kernel.spread is None else kernel.spread[layer, h]
                _draw_bars(axes, kernel.mean[layer, h], spread, width)
                axes.set_ylim(limits)
                if layer == 0:
                    page.text(x0 + h * (width + gap), top - 0.33, f"head {h + 1}", 7, SOFT)
                if layer == layers - 1:
                    _position_axis(axes, kernel.mean.shape[-1] // 2, width)
    _heading(page, title)
    return page.figure


def _limits(kernel: Kernel, height: float) -> tuple[float, float]:
    """The y limits that a term's panels share, with room for the number at the end of a bar."""
    spread = 0 if kernel.spread is None else kernel.spread
    low, high = min(0.0, float((kernel.mean - spread).min())), max(0.0, float((kernel.mean + spread).max()))
    share = 0.125 / height
    room = share / (1 - 2 * share) * max(high - low, 4 * FLAT)
    return low - room, high + room


def _draw_bars(axes: Axes, taps: np.ndarray, spread: np.ndarray | None, width: float) -> None:
    n = len(taps) // 2
    positions = np.arange(-n, n + 1)
    axes.axvspan(-0.5, 0.5, color="#f1f3f6", linewidth=0, zorder=0)
    axes.axhline(0, color=SOFT, linewidth=0.5, zorder=1)
    bars = axes.bar(positions, taps, width=0.78, color=np.where(taps >= 0, MORE, LESS), linewidth=0, zorder=2)
    for bar in (bars[0], bars[-1]):
        bar.set_alpha(0.45)
    if spread is not None:
        axes.vlines(positions, taps - spread, taps + spread, color=INK, linewidth=0.5, alpha=0.6, zorder=3)
    axes.set_xlim(-n - 0.6, n + 0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    words = describe(taps)
    room = 72 * (width + 0.06) / (BOLD * max(len(words), 1))  # to the next head's words
    axes.text(
        0, 1.02, words, transform=axes.transAxes, fontsize=min(7 if width > 1.3 else 6.2, room), va="bottom",
        color=SOFT if words == "flat" else INK, weight="normal" if words == "flat" else "bold",
    )  # fmt: skip
    enough = max(float(np.abs(taps).max()) / 2, FLAT)
    for peak, sign in ((int(np.argmax(taps)), 1), (int(np.argmin(taps)), -1)):
        if sign * taps[peak] >= enough:
            end = taps[peak] + (0 if spread is None else sign * spread[peak])
            axes.annotate(
                signed(taps[peak], 1), (positions[peak], end), xytext=(0, 1.5 * sign), textcoords="offset points",
                ha="center", va="bottom" if sign > 0 else "top", fontsize=6, color=MORE if sign > 0 else LESS,
            )  # fmt: skip


def _position_axis(axes: Axes, n: int, width: float) -> None:
    middle = n // 2 if n >= 4 and width > 1.2 else 0
    ticks = sorted({-n, -middle, 0, middle, n})
    axes.set_xticks(ticks, [f"≤−{n}" if t == -n else f"≥{n}" if t == n else signed(t) for t in ticks])
    if width < 1.2:  # the labels of neighbouring panels would touch
        axes.get_xticklabels()[0].set_horizontalalignment("left")
        axes.get_xticklabels()[-1].set_horizontalalignment("right")


def _strips(terms: Mapping[str, Kernel], title: str) -> Figure:
    """One panel per layer: a row per head, a column per relative position, colour for the logit."""
    layers, heads, taps = next(iter(terms.values())).mean.shape
    columns = min(6, layers)
    left, gap = 0.42, 0.32
    width = min(1.6, (WIDTH - left - 0.15 - gap * (columns - 1)) / columns)
    height = max(0.45, 0.125 * heads)
    rows = -(-layers // columns)
    head, row = 0.5, height + 0.45
    block = head + rows * row + 0.2
    caption = "Rows are heads, numbered at the left and sorted by where they look; + and − mark the strongest tap."
    page = _Page(0.62 + block * len(terms), _caption(terms, caption))
    for index, (name, kernel) in enumerate(terms.items()):
        y0 = 0.62 + index * block
        page.text(0.12, y0 + 0.06, NAMES.get(name, name), 9, weight="bold")
        page.text(0.12, y0 + 0.25, census(kernel.mean), 7.2)
        limit = max(FLAT, float(np.quantile(np.abs(kernel.mean).max(axis=-1), 0.9)))
        for layer in range(layers):
            down, across = divmod(layer, columns)
            axes = page.axes(left + across * (width + gap), y0 + head + 0.16 + down * row, width, height)
            _draw_strip(axes, kernel.mean[layer], limit, labelled=heads <= 16)
            axes.set_title(f"layer {layer + 1}", fontsize=7, color=INK, loc="left", pad=2.5)
            _position_axis(axes, taps // 2, width)
        _colour_key(page, y0 + 0.1, limit)
    _heading(page, title)
    return page.figure


def _draw_strip(axes: Axes, taps: np.ndarray, limit: float, labelled: bool) -> None:
    heads, size = taps.shape
    n = size // 2
    strongest = np.abs(taps).argmax(axis=-1)
    strength = np.take_along_axis(taps, strongest[:, None], axis=-1)[:, 0]
    kind = np.where(np.abs(strength) < FLAT, 2, np.where(strength > 0, 0, 1))
    order = np.lexsort((-np.abs(strength), strongest, kind))
    axes.imshow(
        taps[order], cmap=DIVERGING, norm=Normalize(-limit, limit), aspect="auto", interpolation="nearest",
        extent=(-n - 0.5, n + 0.5, heads - 0.5, -0.5),
    )  # fmt: skip
    axes.spines[:].set(visible=True, color=FAINT, linewidth=0.6)
    for row, head in enumerate(order):
        if kind[head] < 2:
            color = "white" if abs(strength[head]) > 0.45 * limit else INK
            axes.plot(strongest[head] - n, row, "+" if strength[head] > 0 else "_", color=color, ms=3.2, mew=0.7)
    axes.set_yticks(range(heads) if labelled else [], [str(head + 1) for head in order] if labelled else [])
    axes.tick_params(axis="y", labelsize=5)


def _colour_key(page: _Page, top: float, limit: float) -> None:
    axes = page.axes(WIDTH - 1.9, top, 1.6, 0.09)
    axes.imshow(np.linspace(-1, 1, 256)[None], cmap=DIVERGING, aspect="auto", extent=(-limit, limit, 0, 1))
    axes.set_xticks([-limit, 0, limit], [f"≤{signed(-limit, 1)}", "0", f"≥{signed(limit, 1)}"])
    axes.set_yticks([])


# --- the losses ----------------------------------------------------------------------------------------------------


def plot_losses(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str, unigram_loss: float | None
) -> bool:
    """Draws training loss, held-out loss and the loss of the unigram model over the steps; losses in nats per token.

    Args:
      rows: of metrics.jsonl: training rows have `step` and `loss`, evaluation rows `step` and `eval_loss`.
      path: where the picture goes, written atomically.
      title: the heading.
      unigram_loss: the held-out loss of a model that knows only how frequent each token is.

    Returns:
      Whether there was anything to draw; without one finite loss no picture is made.
    """
    train, heldout = _curve(rows, "loss"), _curve(rows, "eval_loss")
    known = [curve[np.isfinite(curve[:, 1])] for curve in (train, heldout)]
    if not any(len(curve) for curve in known):
        return False
    page = _Page(4.2)
    axes = page.axes(0.5, 0.68, WIDTH - 1.75, 4.2 - 0.68 - 0.55)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.plot(*train.T, color=MORE, linewidth=0.9, alpha=0.4, label="training")
    axes.plot(
        *heldout.T,
        color=MORE,
        linewidth=2.2,
        marker="o" if len(heldout) < 30 else None,
        ms=4,
        label="held-out",
        clip_on=False,
    )
    labels = []
    what = "Loss of the masked tokens in nats per token"
    if len(known[1]):
        end = float(known[1][-1, 1])
        labels.append((end, f"held-out {end:.2f}", MORE, "bold"))
        if unigram_loss is not None and end < unigram_loss:
            what += f"; the held-out loss ends {unigram_loss - end:.2f} under the unigram model, which sees no context"
    if len(known[0]):
        # One training row is a noisy figure; the last twentieth of them gives the level.
        level = float(np.median(known[0][-max(1, len(known[0]) // 20) :, 1]))
        labels.append((level, f"training {level:.2f}", "#86aed1", "normal"))
    if unigram_loss is not None and np.isfinite(unigram_loss):
        axes.axhline(unigram_loss, color=LESS, linewidth=1.1, dashes=(4, 3), label="unigram")
        labels.append((unigram_loss, f"unigram {unigram_loss:.2f}", LESS, "normal"))
    _label_ends(axes, labels)
    bad = train[np.isnan(train[:, 1]), 0]
    if len(bad):
        page.text(
            0.12,
            0.54,
            f"the training loss is not a finite number in {len(bad)} rows, first at step {bad[0]:,.0f}",
            7.5,
            LESS,
            weight="bold",
        )
    axes.set_xlim(0, max(float(curve[-1, 0]) for curve in (train, heldout) if len(curve)) or 1)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("step", fontsize=8, color=SOFT)
    page.text(0.12, 0.12, title, 12, weight="bold")
    page.text(0.12, 0.38, what, 7.5, SOFT)
    save(page.figure, path)
    return True


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(points, 2): step and loss in the order of steps; an infinite loss becomes a gap."""
    points = np.array([(row["step"], row[key]) for row in rows if key in row], dtype=np.float64).reshape(-1, 2)
    points[~np.isfinite(points[:, 1]), 1] = np.nan
    return points[np.argsort(points[:, 0], kind="stable")]


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str, str]]) -> None:
    """Writes each label to the right of its line's end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    floor = low
    for value, text, color, weight in sorted(labels):
        middle = max(value, floor)
        floor = middle + 0.065 * (high - low)
        axes.annotate(
            text, (1, middle), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=color, weight=weight, annotation_clip=False
        )  # fmt: skip


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the picture in full or not at all."""
    if bucket.in_a_bucket(path):
        content = io.BytesIO()
        figure.savefig(content, format=os.path.splitext(path)[1][1:] or "png")
        corpus.write_atomically(path, content.getvalue())
        return
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        figure.savefig(temporary, format=path.suffix[1:] or "png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
