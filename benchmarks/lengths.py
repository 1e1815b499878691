"""A real mix of lengths: how many tokens lines of held-out Wikipedia have, and rows of random ids that long.

    python -m benchmarks.lengths wiki_heldout.txt --tokenizer=runs/NAME

counts them with the tokenizer of a run, [CLS] and [SEP] included, cut at 512, into benchmarks/wikipedia_lengths.json,
which `benchmarks.step` draws from.
"""

import json
import pathlib

import numpy as np

from benchmarks.arguments import documented
from convattn_jax.data.examples import Documents, RowFormat, packed, token_dtype
from convattn_jax.data.tokenizer import Tokenizer

FILE = pathlib.Path(__file__).with_name("wikipedia_lengths.json")
CUT = 512
PAD, CLS, SEP, FIRST = 0, 2, 3, 5  # ids; FIRST is the first ordinary one


def main() -> None:
    """Writes the histogram."""
    parser = documented(__doc__)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    lines = [line for line in args.text.read_text().splitlines() if line.strip()]
    counts = histogram([len(ids) for ids in tokenizer.encode(lines)])
    facts = {"text": args.text.name, "vocabulary": tokenizer.size, "lines": len(lines)}
    FILE.write_text(json.dumps({**facts, "counts": counts.tolist()}) + "\n")
    tokens = np.arange(CUT + 1) @ counts
    print(f"{len(lines)} lines, {tokens / len(lines):.1f} tokens on average, {tokens / len(lines) / CUT:.1%} of {CUT}")


def histogram(tokens: list[int]) -> np.ndarray:
    """(CUT + 1,) lines by length, their two special tokens included."""
    return np.bincount(np.minimum(np.array(tokens) + 2, CUT), minlength=CUT + 1)


def draw(count: int, length: int, seed: int) -> np.ndarray:
    """That many lengths out of the histogram, none above `length`."""
    counts = np.array(json.loads(FILE.read_text())["counts"], np.float64)
    drawn = np.random.default_rng(seed).choice(CUT + 1, count, p=counts / counts.sum())
    return np.minimum(drawn, length)


def padded_rows(lengths: np.ndarray, length: int, vocabulary: int, seed: int) -> np.ndarray:
    """One line a row, `[CLS] text [SEP]`, filled up with padding."""
    random = np.random.default_rng(seed)
    rows = random.integers(FIRST, vocabulary, (len(lengths), length)).astype(token_dtype(vocabulary))
    rows[:, 0] = CLS
    rows[np.arange(len(lengths)), lengths - 1] = SEP
    rows[np.arange(length) >= lengths[:, None]] = PAD
    return rows


def packed_rows(lengths: np.ndarray, length: int, vocabulary: int, seed: int) -> np.ndarray:
    """The same lines one after another, as `data.layout=packed` lays out documents."""
    form = RowFormat(length, PAD, CLS, SEP, token_dtype(vocabulary))
    tokens = np.random.default_rng(seed).integers(FIRST, vocabulary, int((lengths - 2).sum())).astype(form.dtype)
    ends = np.cumsum(lengths - 2)
    return np.concatenate(list(packed([Documents(tokens, ends, ends)], form)))


if __name__ == "__main__":
    main()
