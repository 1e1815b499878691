"""Which pictures a comparison has, each with its caption and what is written where it cannot be seen."""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from convattn_jax.config import UserError
from convattn_jax.evaluate import LONGEST_SENTENCE, attention_file, load_attention
from convattn_jax.inference import AttentionMaps, attention_maps
from convattn_jax.learned import load_kernels
from convattn_jax.plots import Kernel
from convattn_jax.report import figures
from convattn_jax.report.runs import Comparison, Run, text_of
from convattn_jax.report.tables import FARTHEST, difference, measures
from convattn_jax.taps import FLAT, census, centred

T = TypeVar("T")
LARGEST = 1 << 24  # numbers in an array that is drawn


class Picture(NamedTuple):
    """A drawing, its title, and its content in words."""

    drawing: figures.Drawing
    title: str
    words: str


class Gallery(NamedTuple):
    """Pictures of one kind beside each other; `lacking` says which variants have none, and why."""

    title: str
    about: str
    pictures: list[Picture]
    lacking: list[str]


def styles(c: Comparison) -> dict[str, int]:
    """The style of each variant."""
    return {name: index for index, name in enumerate(c.variants)}


def losses(c: Comparison) -> Gallery:
    """Held-out loss against the step, the mean over seeds at the steps that all of a variant's runs have."""
    curves, lacking = {}, {}
    for name, runs in c.variants.items():
        known = [dict(run.curve) for run in runs if run.curve]
        steps = sorted(set.intersection(*map(set, known))) if known else []
        curves[name] = [(step, float(np.mean([one[step] for one in known]))) for step in steps]
        if not steps:
            lacking[name] = "no evaluation yet"
    drawn = {name: curve for name, curve in curves.items() if curve}
    pictures = []
    if drawn:
        words = "; ".join(f"{name} ends at {curve[-1][1]:.3f}" for name, curve in drawn.items())
        drawing = figures.lines(drawn, styles(c), "step", "held-out loss, nat")
        pictures.append(Picture(drawing, "all of training", words))
        late = {name: [p for p in curve if p[0] >= curve[-1][0] / 2] for name, curve in drawn.items()}
        if all(len(curve) > 1 for curve in late.values()):
            near = _near(late)
            drawing = figures.lines(near, styles(c), "step", "held-out loss, nat")
            far = ", ".join(f"“{name}”" for name in late if name not in near)
            pictures.append(Picture(drawing, f"its second half{far and f', without {far}'}", words))
    about = "Mean over pre-training seeds. Lines differ in marker and dashes; the legend is in the order of their ends."
    return Gallery("Loss curves", about, pictures, _by_reason(lacking))


def _near(curves: Mapping[str, figures.Curve]) -> dict[str, figures.Curve]:
    """Without those that end so far above the rest that the differences of the rest could not be seen beside them."""
    near = dict(sorted(curves.items(), key=lambda item: -item[1][-1][1]))
    while len(near) > 2:
        first, second, *_, last = (curve[-1][1] for curve in near.values())
        if first - second <= second - last:
            break
        del near[next(iter(near))]
    return near


def differences(c: Comparison) -> Gallery:
    """The differences to the baseline, one picture a measure."""
    pictures = []
    for measure in measures(c) if c.baseline else []:
        found = {n: one for n in c.variants if n != c.baseline and (one := difference(c, n, measure, c.baseline))}
        if found:
            words = "; ".join(f"{name} {one.mean:+.{measure.digits}f}" for name, one in found.items())
            pictures.append(Picture(figures.intervals(found, measure, c.baseline), measure.name, words))
    about = (
        f"To {c.baseline}, paired over seeds: mean, and 95 % interval where there are two seeds or more. A filled dot: "
        "the interval excludes zero."
    )
    return Gallery("Differences in pictures", about, pictures, [])


def distances(c: Comparison) -> Gallery:
    """Accuracy of the probe `distance` by distance."""
    curves = {}
    for name in c.variants:
        means = [(float(d), c.values(name, f"distance:{d}")) for d in range(1, FARTHEST + 1)]
        curves[name] = [(d, 100 * float(np.mean(list(values.values())))) for d, values in means if values]
    drawn = {name: curve for name, curve in curves.items() if curve}
    lacking = _by_reason({name: "the probe “distance” has not been run" for name in c.variants if name not in drawn})
    if not drawn:
        return Gallery("", "", [], lacking)
    words = "; ".join(f"{name}: " + ", ".join(f"{y:.0f}" for _, y in curve) for name, curve in drawn.items())
    drawing = figures.lines(
        drawn, styles(c), "words apart", "rows whose distance is named right, per cent", 100 / FARTHEST
    )
    return Gallery("", "", [Picture(drawing, "the grey line: a guess at random", words)], lacking)


def kernels(c: Comparison) -> Gallery:
    """The learned kernels of each variant's first seed, on one scale."""
    found: dict[str, dict[str, Kernel]] = {}
    lacking = {}
    for name, runs in c.variants.items():
        terms = {t: k for t, k in (_first(runs, _kernels) or {}).items() if _is_drawable(k)}
        if terms:
            found[name] = terms
        else:
            here = any((run.folder / "kernels.npz").exists() for run in runs)
            lacking[name] = "no taps in the scores" if here else "no kernels.npz yet"
    strongest = [np.abs(centred(k.mean)).max(-1).ravel() for terms in found.values() for k in terms.values()]
    limit = max(FLAT, float(np.quantile(np.concatenate(strongest), 0.9))) if strongest else FLAT
    pictures = []
    for name, terms in found.items():
        words = "; ".join(f"{term}: {census(centred(kernel.mean))}" for term, kernel in terms.items())
        pictures.append(Picture(figures.kernels(terms, limit), name, words))
    about = (
        "What is added to the attention logits, by the key's place: − before the query, + after it; the outermost "
        "taps stand for all tokens further away. A row a head. Blue and + draw attention, orange and − repel it; the "
        f"colours are full at {limit:.1f} logits, the same in all pictures. Of the first seed; a dynamic kernel is the "
        "mean over held-out tokens."
    )
    return Gallery("Learned kernels", about, pictures, _by_reason(lacking))


def attention(c: Comparison, sentence: str) -> Gallery:
    """The attention maps of a sentence, of each variant's first seed that has or can make them."""
    pictures, lacking = [], {}
    for name, runs in c.variants.items():
        found = _first(runs, lambda run: _attention(run, sentence))
        if found is None:
            lacking[name] = "no maps of this sentence, and no checkpoint to make them with"
        elif not found.weights.size:
            lacking[name] = "nothing in it attends"
        else:
            words = f"attention among {' '.join(found.tokens)}"
            pictures.append(Picture(figures.attention(found), name, words))
    about = (
        f"Of “{sentence}”. Queries down, keys across, darker for more (by the square root); at most four layers, from "
        "the first to the last, and the first four heads. Of the first seed."
    )
    return Gallery("Attention maps", about, pictures, _by_reason(lacking))


def _by_reason(lacking: Mapping[str, str]) -> list[str]:
    """variant -> reason as `variants: reason`."""
    reasons = dict.fromkeys(lacking.values())
    return [f"{', '.join(name for name in lacking if lacking[name] == reason)}: {reason}" for reason in reasons]


def _first(runs: list[Run], load: Callable[[Run], T | None]) -> T | None:
    return next((found for run in runs if (found := load(run)) is not None), None)


def _kernels(run: Run) -> dict[str, Kernel] | None:
    return _tolerant(lambda: load_kernels(run.folder / "kernels.npz"))


def _is_drawable(kernel: Kernel) -> bool:
    mean = kernel.mean
    shaped = mean.ndim == 3 and 0 < mean.size <= LARGEST and mean.shape[-1] % 2 == 1 and mean.shape[-1] >= 3
    return shaped and mean.dtype.kind == "f" and bool(np.isfinite(mean).all())


def _attention(run: Run, sentence: str) -> AttentionMaps | None:
    """The maps that were kept, or those that the checkpoint gives."""
    found = _tolerant(lambda: load_attention(attention_file(run.folder, sentence)))
    if found is None and any((run.folder / "checkpoints").glob("*")):
        found = _tolerant(lambda: attention_maps(run.folder, sentence, LONGEST_SENTENCE))
    if found is None or found.weights.ndim != 4 or found.weights.shape[2:] != (len(found.tokens),) * 2:
        return None
    if found.weights.size > LARGEST or not np.isfinite(found.weights).all():
        return None
    return found._replace(tokens=[text_of(token, 16) for token in found.tokens])


def _tolerant(load: Callable[[], T]) -> T | None:
    """What is loaded; None of a file that is not there or damaged."""
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, UserError):
        return None
    except (zipfile.BadZipFile, zlib.error):
        return None
