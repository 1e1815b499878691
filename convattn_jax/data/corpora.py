"""Where text comes from: a literal table of sources, each a function from the configuration to a `Corpus`."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from convattn_jax.config import check, check_choice
from convattn_jax.data import docstrings, textfiles, tfds_source
from convattn_jax.data.config import DataConfig
from convattn_jax.data.corpus import Corpus, Document, Report, Split, silent

__all__ = ["SOURCES", "Corpus", "Document", "Report", "Split", "open_corpus", "silent"]


def _docstrings(config: DataConfig, report: Report) -> Corpus:
    path = docstrings.stored(config.cache_dir, report)
    return textfiles.open_files((str(path),), (), config.heldout_fraction, config.cache_dir, report)


def _text(config: DataConfig, report: Report) -> Corpus:
    return textfiles.open_files(config.files, config.heldout_files, config.heldout_fraction, config.cache_dir, report)


def _tfds(config: DataConfig, report: Report) -> Corpus:
    return tfds_source.open_data_set(
        config.tfds_name, config.tfds_split, config.tfds_feature, config.tfds_data_dir, config.heldout_fraction, report
    )


SOURCES: Mapping[str, Callable[[DataConfig, Report], Corpus]] = {
    "docstrings": _docstrings,
    "text": _text,
    "tfds": _tfds,
}
_FIELDS = {"docstrings": "data.source=docstrings", "text": "data.files", "tfds": "data.tfds_name"}


def open_corpus(config: DataConfig, report: Report = silent) -> Corpus:
    """Opens the corpus that the configuration names and looks for a first document in either split.

    Raises:
      UserError: what is wrong with the files or the data set; a split without a document.
    """
    check_choice("data.source", config.source, SOURCES)
    corpus = SOURCES[config.source](config, report)
    field = _FIELDS[config.source]
    train, heldout = (_has_text(corpus, split) for split in ("train", "heldout"))
    where = ", ".join(config.files) if config.source == "text" else "it"
    check(train or heldout, f"{field}: there is no text in {where}")
    own_files = config.source == "text" and bool(config.heldout_files)
    check(train or not own_files, f"data.files: there is no text in {where}; only data.heldout_files has some")
    check(heldout or not own_files, f"data.heldout_files: there is no text in {', '.join(config.heldout_files)}")
    for found, name in ((train, "training"), (heldout, "held-out")):
        check(
            found,
            f"{field}: data.heldout_fraction={config.heldout_fraction} leaves no {name} document; documents end at "
            "blank lines: give more of them, another fraction, or data.heldout_files",
        )
    return corpus


def _has_text(corpus: Corpus, split: Split) -> bool:
    with contextlib.closing(cast(Any, corpus.documents(split))) as documents:
        return next(documents, None) is not None
