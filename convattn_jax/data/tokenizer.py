"""SentencePiece behind a small immutable class: trained on the corpus or given as a .model.

Source: Kudo (2018), Subword Regularization, section 3.2 (the unigram model); the normalization and the places of
special ids in a foreign model are those of the ALBERT tokenizer.
"""

import functools
import hashlib
import io
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
from etils import epath

from convattn_jax.config import UserError, check, check_choice
from convattn_jax.data.config import NORMALIZATIONS

MODEL_FILE = "tokenizer.model"
META_FILE = "tokenizer.json"
_NAMES = {"pad": "<pad>", "unk": "<unk>", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_APPENDED = ("cls", "sep", "pad", "mask")  # the order in which a foreign model gets the ones that it lacks
_WORD_START = "\u2581"

_SAMPLE = 40_000_000  # characters that a model is trained on, at most
_LONGEST_LINE = 4_000  # characters; longer lines are cut for training
_MAX_SENTENCE_BYTES = 1 << 17  # more than any cut line has, normalized: SentencePiece would leave it out
_THREADS = 2  # fixed, for their number decides how sums are rounded


class Tokenizer:
    """A SentencePiece model with its normalization and special ids; immutable, pickles to worker processes.

    Attributes:
      pad, unk, cls, sep, mask: the special ids.
      size: number of ids, special ones included.
      normalization: what happens to text first, see `normalize`.
      digest: hex digest of the model's bytes and the normalization.
      special: bool (size,), ids that are never masked and never drawn as a random replacement.
      starts_word: bool (size,), pieces that begin a word, and special ids.
    """

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    def __init__(self, model: bytes, normalization: str):
        """Reads a serialised model; raises RuntimeError if it is none."""
        check_choice("tokenizer.normalization", normalization, NORMALIZATIONS)
        self._model = _as_control_symbols(model)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self.normalization = normalization
        self.digest = hashlib.blake2b(self._model + normalization.encode(), digest_size=16).hexdigest()

        pieces = [self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())]
        own = {piece: i for i, piece in enumerate(pieces)}
        ids = {name: own[text] for name, text in _NAMES.items() if text in own}
        ids["unk"] = self._processor.unk_id()
        if self._processor.pad_id() >= 0:
            ids["pad"] = self._processor.pad_id()
        for name in _APPENDED:
            if name not in ids:
                ids[name] = len(pieces)
                pieces.append(_NAMES[name])
        self.__dict__.update(ids)
        self._pieces = tuple(pieces)
        self.size = len(pieces)

        special = np.zeros(self.size, bool)
        special[list(ids.values())] = True
        for i in range(self._processor.get_piece_size()):
            special[i] |= self._processor.is_control(i) or self._processor.is_unused(i)
        self.special = special
        self.starts_word = special | np.array([piece.startswith(_WORD_START) for piece in pieces])
        self.special.setflags(write=False)
        self.starts_word.setflags(write=False)

    def __reduce__(self):
        return Tokenizer, (self._model, self.normalization)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The int32 ids of each text, without special tokens; one thread, which leaves the interpreter lock free."""
        normalized = [normalize(text, self.normalization) for text in texts]
        return self._processor.encode(normalized, return_type="numpy", num_threads=1)

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        """The text of some ids; control symbols have none, appended ones stand as they are named."""
        known = self._processor.get_piece_size()
        runs: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            if index < known:
                run.append(index)
                continue
            runs += [self._processor.decode(run)] if run else []
            runs.append(self._pieces[index])
            run = []
        runs += [self._processor.decode(run)] if run else []
        return " ".join(runs)

    def piece(self, index: int) -> str:
        """The piece of one id, with U+2581 where a word begins."""
        return self._pieces[index]

    def save(self, folder: epath.PathLike) -> None:
        """Writes tokenizer.model and tokenizer.json into a folder that is there."""
        folder = epath.Path(folder)
        (folder / MODEL_FILE).write_bytes(self._model)
        meta = {"normalization": self.normalization, "size": self.size, "digest": self.digest}
        meta |= {name: getattr(self, name) for name in _NAMES}
        (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")

    @classmethod
    def load(cls, folder: epath.PathLike) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
          UserError: a file is missing or unreadable, or the two do not belong together.
        """
        meta_path = epath.Path(folder) / META_FILE
        try:
            meta = json.loads(meta_path.read_text())
            normalization, digest = meta["normalization"], meta["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{meta_path}: is missing or no tokenizer description; restore it from a copy") from error
        model_path = meta_path.with_name(MODEL_FILE)
        check(model_path.exists(), f"{model_path} is lost: restore it from a copy of the run folder")
        tokenizer = cls.from_file(model_path, normalization)
        check(
            tokenizer.digest == digest,
            f"{meta_path}: belongs to another model than the {MODEL_FILE} beside it; restore the two from one copy",
        )
        return tokenizer

    @classmethod
    def from_file(cls, path: epath.PathLike, normalization: str) -> "Tokenizer":
        """Reads a SentencePiece .model, one's own or a foreign one.

        Raises:
          UserError: there is no such file, or it is none.
        """
        path = epath.Path(path).expanduser()
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer.model: {path} cannot be read ({error.strerror}); name a .model") from error
        try:
            return cls(model, normalization)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"tokenizer.model: {path} is no SentencePiece model; name a .model file") from error


def _as_control_symbols(model: bytes) -> bytes:
    """Makes [CLS], [SEP] and [MASK] of a foreign model control symbols, which text cannot spell."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # built at run time, so that type checkers see nothing in it
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError("not a SentencePiece model") from error
    if not proto.pieces:
        raise ValueError("a SentencePiece model without pieces")
    changed = False
    kinds = messages.ModelProto.SentencePiece
    for piece in proto.pieces:
        if piece.piece in ("[CLS]", "[SEP]", "[MASK]", "<pad>") and piece.type != kinds.CONTROL:
            piece.type = kinds.CONTROL
            changed = True
    return proto.SerializeToString(deterministic=True) if changed else model


def train(lines: Iterable[str], vocab_size: int, normalization: str) -> Tokenizer:
    """Trains a unigram model of `vocab_size` pieces, the special ones included; equal lines give equal bytes.

    Of a large corpus it sees a sample of at most 40 million characters, drawn line by line over all of it.

    Raises:
      UserError: there are no lines, or too few for the vocabulary.
    """
    check_choice("tokenizer.normalization", normalization, NORMALIZATIONS)
    kept = sample(lines, _SAMPLE)
    check(any(line.strip() for line in kept), "tokenizer.model is empty and the corpus has no text to train one on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for line in kept for part in _cut(normalize(line, normalization))),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=False,
            normalization_rule_name="identity" if normalization == "none" else "nmt_nfkc",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece=_NAMES["pad"],
            unk_piece=_NAMES["unk"],
            control_symbols=[_NAMES["cls"], _NAMES["sep"], _NAMES["mask"]],
            max_sentence_length=_MAX_SENTENCE_BYTES,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=_THREADS,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from error
    return Tokenizer(model.getvalue(), normalization)


def _explained(message: str, vocab_size: int) -> UserError:
    """What a failed training says, in the words of the configuration."""
    if most := re.search(r"value <= (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size={vocab_size}: the corpus supports at most {most[1]}; lower it or give more text"
        )
    if least := re.search(r"smaller than required_chars.*?(\d+) vs (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size={vocab_size}: the corpus has characters that need at least {least[2]}; raise it"
        )
    return UserError(
        f"tokenizer.vocab_size={vocab_size}: SentencePiece cannot train on this corpus ({' '.join(message.split())})"
    )


def sample(lines: Iterable[str], limit: int) -> list[str]:
    """At most about `limit` characters of lines, in order, each line as likely as any other; the same ones each time.

    Every line draws a number; whenever the kept ones exceed the limit, the bound that they must lie under halves.
    """
    draw = random.Random(0).random
    kept: list[tuple[float, str]] = []
    bound, size = 1.0, 0
    for line in lines:
        number = draw()
        if number >= bound:
            continue
        kept.append((number, line))
        size += len(line)
        while size > limit and len(kept) > 1:
            bound /= 2
            kept = [item for item in kept if item[0] < bound]
            size = sum(len(item[1]) for item in kept)
    return [line for _, line in kept]


def _cut(line: str) -> Iterator[str]:
    """Parts of a line of at most `_LONGEST_LINE` characters, cut at spaces where there are any."""
    start = 0
    while len(line) - start > _LONGEST_LINE:
        stop = line.rfind(" ", start + 1, start + _LONGEST_LINE)
        stop = stop if stop > 0 else start + _LONGEST_LINE
        yield line[start:stop]
        start = stop
    yield line[start:]


def normalize(text: str, normalization: str) -> str:
    """`reference`: single spaces, `` and '' as ", NFKD without combining marks, lower case; `none`: unchanged."""
    return _NORMALIZE[normalization](text)


def _reference(text: str) -> str:
    if "  " in text or not text.isprintable():  # all white space but the plain blank is unprintable
        text = " ".join(text.split())
    text = text.strip().replace("``", '"').replace("''", '"')
    if not text.isascii():
        text = _BEYOND_ASCII.sub(lambda match: _unaccented(match[0]), text)
    return text.lower()


_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")


@functools.cache
def _unaccented(character: str) -> str:
    """One character decomposed without its combining marks; their order does not matter, so text goes by characters."""
    return "".join(part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part))


_NORMALIZE: Mapping[str, Callable[[str], str]] = {"reference": _reference, "none": lambda text: text}
