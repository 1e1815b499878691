"""How fast text becomes token rows, and rows become batches.

    python -m benchmarks.data                       # the docstring corpus
    python -m benchmarks.data wiki/*.txt --vocab-size 30004 --json data.jsonl

Preparation is the whole of it: reading, normalizing, tokenizing, laying out and writing rows, the tokenizer being
trained already. Beside it stands SentencePiece's own batch encoding of the same lines, in memory and normalized before
the clock starts. Both use all cores. Runs alternate; the table shows medians and the range over the repeats.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import sentencepiece

from benchmarks.arguments import documented, positive
from convattn_jax.data import loader, rows
from convattn_jax.data.config import LAYOUTS, DataConfig, TokenizerConfig
from convattn_jax.data.corpora import open_corpus
from convattn_jax.data.tokenizer import normalize


def arguments() -> argparse.Namespace:
    parser = documented(__doc__)
    parser.add_argument("files", nargs="*", help="text files; none: the docstring corpus")
    parser.add_argument("--layout", choices=LAYOUTS, default="pairs")
    parser.add_argument("--length", type=positive, default=128, help="tokens per row")
    parser.add_argument("--model", default="", help="a SentencePiece .model (default: train one on the text)")
    parser.add_argument("--vocab-size", type=positive, default=4096, help="of the tokenizer")
    parser.add_argument("--normalization", default="reference", help="reference | none")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes and threads")
    parser.add_argument("--batch-size", type=positive, default=256, help="rows per batch")
    parser.add_argument("--batches", type=positive, default=2000, help="batches per repeat")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per measurement")
    return parser.parse_args()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, cache: pathlib.Path) -> dict[str, tuple[str, list[float]]]:
    """Speeds by name, with their unit."""
    source = "text" if args.files else "docstrings"
    data = DataConfig(
        source, tuple(args.files), (), 0.02, 1.0, "", "", "", "", args.layout, args.length, str(cache), args.workers
    )
    tokenizer = TokenizerConfig(args.model, args.vocab_size, args.normalization)
    prepared = rows.prepare(data, tokenizer, args.batch_size)  # trains the tokenizer; warms up

    corpus = open_corpus(data)
    lines = [line for split in rows.SPLITS for document in corpus.documents(split) for line in document]
    megabytes = sum(len(line.encode()) + 1 for line in lines) / 1e6
    lines = [normalize(line, args.normalization) for line in lines]
    prepared.tokenizer.save(cache)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(cache / "tokenizer.model"))
    print(f"{megabytes:.1f} MB of text, {len(prepared.train.tokens)} rows of {args.length}, {args.workers} workers")

    def prepare():
        for folder in cache.glob("rows-*"):
            shutil.rmtree(folder)
        rows.prepare(data, tokenizer, args.batch_size)

    def load():
        for step in range(args.batches):
            loader.batch(prepared.train, 0, step, args.batch_size)

    tokens = args.batches * args.batch_size * args.length
    runs = {
        "preparation": ("MB/s", megabytes, prepare),
        "SentencePiece alone": ("MB/s", megabytes, lambda: processor.encode(lines, num_threads=args.workers)),
        "loader, one core": ("million tokens/s", tokens / 1e6, load),
    }
    speeds: dict[str, tuple[str, list[float]]] = {name: (unit, []) for name, (unit, _, _) in runs.items()}
    for _ in range(args.repeats):
        for name, (_, amount, run) in runs.items():
            speeds[name][1].append(amount / seconds(run))
    return speeds


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        speeds = measure(args, pathlib.Path(folder))
    print(f"{'':20} {'median':>8} {'least':>8} {'most':>8}")
    for name, (unit, values) in speeds.items():
        print(f"{name:20} {statistics.median(values):8.1f} {min(values):8.1f} {max(values):8.1f} {unit}")
        if args.json:
            record = {"name": name, "unit": unit, "median": statistics.median(values), "values": values}
            with open(args.json, "a") as file:
                file.write(json.dumps(record | {"settings": vars(args)}) + "\n")


if __name__ == "__main__":
    main()
