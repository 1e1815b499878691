"""Token rows on disk: text is tokenised once into memory-mapped rows that every later run reuses.

The rows are a function of text, tokenizer, layout and length; their fingerprint names these, and the folder
`rows-<fingerprint>` of the cache holds them; where the cache is in a bucket, so does a copy on a local disk.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from convattn_jax.config import UserError, check
from convattn_jax.data import cache, parallel, shared
from convattn_jax.data import tokenizer as tokenizers
from convattn_jax.data.config import DataConfig, TokenizerConfig
from convattn_jax.data.corpora import open_corpus
from convattn_jax.data.corpus import Corpus, Report, Split, cache_folder, local_folder, reduced, silent
from convattn_jax.data.examples import LAYOUTS, Documents, RowFormat, token_dtype
from convattn_jax.data.tokenizer import Tokenizer

VERSION = 1  # of the files and of the way text becomes rows; part of the fingerprint
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Memory-mapped token rows and the fingerprint that their order is drawn from."""

    tokens: np.ndarray  # uint16 or uint32, (N, T)
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that training needs of a corpus."""

    train: Rows
    heldout: Rows
    tokenizer: Tokenizer
    counts: (
        np.ndarray
    )  # int64 (tokenizer.size,): tokens of the train text, without the [CLS], [SEP] and padding of rows
    fingerprint: str


def prepare(data: DataConfig, tokenizer: TokenizerConfig, batch_size: int, report: Report = silent) -> Prepared:
    """The rows of a configuration, out of the cache, or prepared first where the cache lacks them.

    Raises:
      UserError: wrong text, tokenizer or cache, fewer train rows than one batch, or no held-out rows.
    """
    parallel.check_guarded()
    shared.check_reached(data.cache_dir)
    cache_folder(data.cache_dir)
    given = Tokenizer.from_file(tokenizer.model, tokenizer.normalization) if tokenizer.model else None
    corpus = open_corpus(data, report)
    used = given or _trained(data.cache_dir, corpus, tokenizer, report)
    corpus = reduced(corpus, data.fraction)  # after the tokenizer: losses per token compare only under the same one
    fingerprint = _digest("rows", VERSION, corpus.fingerprint, used.digest, data.layout, data.length)

    def make(folder: pathlib.Path) -> None:
        _write(folder, fingerprint, corpus, used, data, report)

    prepared = _open(shared.obtain(data.cache_dir, f"rows-{fingerprint}", make, report), fingerprint, used)

    rows = len(prepared.train.tokens)
    check(
        rows >= batch_size,
        f"train.batch_size={batch_size}: the train text makes only {rows} rows of data.length={data.length}; "
        "give more text (data.files, data.fraction) or a smaller batch",
    )
    check(
        len(prepared.heldout.tokens) > 0,
        f"data.heldout_fraction={data.heldout_fraction}: no text is held out; raise it or name data.heldout_files",
    )
    return prepared


def reopen(cache_dir: str, fingerprint: str, tokenizer: Tokenizer, report: Report = silent) -> Prepared | None:
    """The rows that a run was started with, without a look at the source text; None where the cache lacks them.

    Raises:
      UserError: the cache is damaged or was made with another tokenizer.
    """
    name = f"rows-{fingerprint}"
    there = shared.found(cache_dir, name, report)
    return _open(local_folder(cache_dir) / name, fingerprint, tokenizer) if there else None


def _trained(cache_dir: str, corpus: Corpus, config: TokenizerConfig, report: Report) -> Tokenizer:
    """The tokenizer of this corpus, shared by all that differ only in layout, length or model."""

    def make(folder: pathlib.Path) -> None:
        report("training the tokenizer", 0, 0)
        lines = itertools.chain.from_iterable(corpus.documents("train"))
        trained = tokenizers.train(lines, config.vocab_size, config.normalization)
        with cache.errors(folder.parent):
            trained.save(folder)

    key = _digest("tokenizer", VERSION, corpus.fingerprint, config.vocab_size, config.normalization)
    folder = shared.obtain(cache_dir, f"tokenizer-{key}", make, report)
    try:
        return Tokenizer.load(folder)
    except UserError as error:
        raise UserError(f"data.cache_dir: {folder} is damaged ({error}); delete this folder and start again") from error


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _write(
    folder: pathlib.Path, fingerprint: str, corpus: Corpus, tokenizer: Tokenizer, data: DataConfig, report: Report
) -> None:
    dtype = token_dtype(tokenizer.size)
    form = RowFormat(data.length, tokenizer.pad, tokenizer.cls, tokenizer.sep, dtype)
    counts = np.zeros(tokenizer.size, np.int64)
    rows: dict[str, int] = dict.fromkeys(SPLITS, 0)
    done = 0

    def watched(results: Iterable[parallel.Result]) -> Iterator[Documents]:
        nonlocal done
        for result in results:
            if result.split == "train":
                counts[:] += np.bincount(result.documents.tokens, minlength=tokenizer.size)
            yield result.documents
            done += result.characters
            report("tokenizing", done, corpus.size if done < corpus.size else 0)  # compressed text exceeds its size

    work = (task for split in SPLITS for task in parallel.tasks(split, corpus.documents(split)))
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(contextlib.closing(parallel.tokenize(work, tokenizer, data.workers)))
        files: dict[str, io.FileIO] = {split: stack.enter_context(_file(folder / f"{split}.bin")) for split in SPLITS}
        for split, group in itertools.groupby(results, key=lambda result: result.split):
            for block in LAYOUTS[data.layout](watched(group), form):
                rows[split] += len(block)
                with cache.errors(folder.parent):
                    cache.write_all(files[split], block.tobytes())
    report("tokenizing", done, done)

    manifest = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "tokenizer": tokenizer.digest,
        "layout": data.layout,
        "length": data.length,
        "dtype": dtype.str,
        "rows": rows,
    }
    with cache.errors(folder.parent):
        np.save(folder / "counts.npy", counts)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@contextlib.contextmanager
def _file(path: pathlib.Path) -> Iterator[io.FileIO]:
    with cache.errors(path.parent.parent):
        file = path.open("wb", buffering=0)  # raw: a full disk is an error of the write, not of the close
    with file:
        yield file


def _open(folder: pathlib.Path, fingerprint: str, tokenizer: Tokenizer) -> Prepared:
    remedy = "delete this folder and start again"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        dtype, length, rows = np.dtype(manifest["dtype"]), manifest["length"], manifest["rows"]
        digest = manifest["tokenizer"]
        whole = (manifest["version"], manifest["fingerprint"]) == (VERSION, fingerprint)
        for split in SPLITS:
            whole = whole and (folder / f"{split}.bin").stat().st_size == rows[split] * length * dtype.itemsize
        counts = np.load(folder / "counts.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"data.cache_dir: {folder} is damaged ({type(error).__name__}: {error}); {remedy}") from error
    check(whole, f"data.cache_dir: {folder} is damaged: its files are not what its manifest says; {remedy}")
    check(
        digest == tokenizer.digest and counts.shape == (tokenizer.size,),
        f"data.cache_dir: tokenizer and cache don't match: {folder} was made with another tokenizer; {remedy}",
    )

    def mapped(split: Split) -> Rows:
        shape = (rows[split], length)
        if not rows[split]:  # an empty file can't be mapped
            return Rows(np.empty(shape, dtype), fingerprint)
        return Rows(np.asarray(np.memmap(folder / f"{split}.bin", dtype, "r", shape=shape)), fingerprint)

    return Prepared(mapped("train"), mapped("heldout"), tokenizer, counts, fingerprint)
