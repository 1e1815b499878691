"""What the data side of a configuration says, checked."""

import dataclasses

from convattn_jax.config import check, check_choice

SOURCES = ("docstrings", "text", "tfds")
LAYOUTS = ("pairs", "packed")
NORMALIZATIONS = ("reference", "none")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows; `configs/base.py` documents each key."""

    source: str
    files: tuple[str, ...]
    heldout_files: tuple[str, ...]
    heldout_fraction: float
    fraction: float
    tfds_name: str
    tfds_split: str
    tfds_feature: str
    tfds_data_dir: str
    layout: str
    length: int
    cache_dir: str
    workers: int

    def __post_init__(self):
        check_choice("data.source", self.source, SOURCES)
        check_choice("data.layout", self.layout, LAYOUTS)
        check(self.length >= 8, f"data.length={self.length} must be at least 8 tokens")
        check(0 < self.heldout_fraction < 1, f"data.heldout_fraction={self.heldout_fraction} must lie between 0 and 1")
        check(0 < self.fraction <= 1, f"data.fraction={self.fraction} must lie above 0 and at most at 1 (all the text)")
        check(self.workers >= 0, f"data.workers={self.workers} must be 0 (one per core) or more")
        check(
            self.source != "text" or bool(self.files),
            "data.files is empty: name your text, such as --config.data.files='wiki/*.txt.xz', "
            "or set --config.data.source=docstrings",
        )
        check(
            self.source != "tfds" or bool(self.tfds_name),
            "data.tfds_name is empty: name a data set, such as --config.data.tfds_name=lm1b",
        )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece model; `configs/base.py` documents each key."""

    model: str
    vocab_size: int
    normalization: str

    def __post_init__(self):
        check_choice("tokenizer.normalization", self.normalization, NORMALIZATIONS)
        check(self.vocab_size >= 32, f"tokenizer.vocab_size={self.vocab_size} must be at least 32")
