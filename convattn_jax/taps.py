"""Reading a learned kernel: its taps without the constant that means nothing, and what it looks at, in words."""

import collections
from typing import NamedTuple

import numpy as np

FLAT = 0.3  # logits: attention weights that differ by less than 35 % count as equal


class Kernel(NamedTuple):
    """One term's taps in logits, (layers, heads, 2n+1), at relative positions -n..n; `spread` is over tokens."""

    mean: np.ndarray
    spread: np.ndarray | None = None


def centred(taps: np.ndarray) -> np.ndarray:
    """taps (..., W) minus the mean of the two outermost ones, the level of everything out of reach.

    The softmax ignores a constant added to a row of logits, so only differences between taps mean anything. Centre
    each token's kernel before taking its spread over tokens: a shift of a whole row is not a spread.
    """
    taps = np.asarray(taps, dtype=np.float64)
    return taps - (taps[..., :1] + taps[..., -1:]) / 2


def describe(taps: np.ndarray) -> str:
    """What a centred kernel (W,) looks at, in words: 'previous', 'window ±2', 'next, not itself', 'flat'."""
    enough = max(float(np.abs(taps).max()) / 2, FLAT)
    more = _where(taps) if taps.max() >= enough else ""
    less = _where(-taps) if -taps.min() >= enough else ""
    if more and less:
        return f"{more}, not {less}"
    return more or (f"not {less}" if less else "flat")


def census(kernels: np.ndarray) -> str:
    """How many of the centred kernels (layers, heads, W) look where, the most frequent first."""
    words = [_kind(describe(taps)) for taps in kernels.reshape(-1, kernels.shape[-1])]
    counts = collections.Counter(words).most_common()
    return f"{len(words)} heads:  " + "  ·  ".join(f"{count} {word}" for word, count in counts)


def signed(number: float | int, digits: int = 0) -> str:
    """A number with its sign, a true minus: −3.1, 0, +3.1."""
    text = f"{number:+.{digits}f}".replace("-", "−")
    return text if float(f"{number:.{digits}f}") else text[1:]


def _kind(words: str) -> str:
    """The group of a description: what it looks at, whatever it avoids besides, and however far it reaches."""
    words = words.split(", not ")[0]
    for word, kind in (
        ("back", "further back"),
        ("ahead", "further ahead"),
        ("window", "a window"),
        ("to", "a window"),
    ):
        if word in words.split() and not words.startswith("not"):
            return kind
    return (
        words
        if words in ("previous", "next", "itself", "neighbours", "before", "after", "not itself", "flat")
        else "other"
    )


def _where(taps: np.ndarray) -> str:
    """The place of the highest tap, with the taps beside it that reach half its height."""
    n = len(taps) // 2
    high = taps >= taps.max() / 2
    first = last = int(np.argmax(taps))
    while first > 0 and high[first - 1]:
        first -= 1
    while last < 2 * n and high[last + 1]:
        last += 1
    first, last = first - n, last - n
    if n > 1 and first == last and abs(first) == 1 and high[n - first]:
        return "neighbours"
    if first == -n:
        return "before" if last < 0 else f"up to {signed(last)}"
    if last == n:
        return "after" if first > 0 else f"from {signed(first)}"
    if first == last and abs(first) <= 1:
        return {-1: "previous", 0: "itself", 1: "next"}[first]
    if last < 0:
        return f"{-last}–{-first} back" if first < last else f"{-last} back"
    if first > 0:
        return f"{first}–{last} ahead" if first < last else f"{first} ahead"
    return f"window ±{last}" if last == -first else f"{signed(first)} to {signed(last)}"
