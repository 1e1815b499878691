"""What a corpus is: a stream of documents in two splits, with a fingerprint and a size."""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Literal

from etils import epath

from convattn_jax.config import UserError
from convattn_jax.data.bucket import in_a_bucket

Document = list[str]  # lines (paragraphs), none of them empty, no newline inside
Report = Callable[[str, int, int], None]  # (what, done, total); total 0: not known
Split = Literal["train", "heldout"]

COPIES = "~/.cache/convattn_jax"  # here each host keeps its copies of caches in buckets
_LONGEST = 1 << 20  # characters of a document; longer ones are cut into several, so that memory stays bounded


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that says nothing."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text, read again from its source at each call of `documents`, never held whole in memory.

    Attributes:
      fingerprint: hex digest of the text and of what decides about its splits.
      size: bytes of text as stored, for progress.
      read: the documents of a split, in a stable order.
    """

    fingerprint: str
    size: int
    read: Callable[[Split], Iterator[Document]] = dataclasses.field(repr=False, compare=False)

    def documents(self, split: Split) -> Iterator[Document]:
        """Streams the documents of one split, in the same order each time."""
        return self.read(split)


def is_heldout(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: a function of its text alone, whatever stands around it."""
    digest = hashlib.blake2b("\n".join(document).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def select(documents: Iterator[Document], split: Split, fraction: float) -> Iterator[Document]:
    """The documents of one split, by hash of their text."""
    return (document for document in documents if is_heldout(document, fraction) == (split == "heldout"))


def reduced(corpus: Corpus, fraction: float) -> Corpus:
    """The corpus with a share of its training documents, chosen by hash; a smaller share lies within a larger one."""
    if fraction == 1:
        return corpus

    def chosen(document: Document) -> bool:
        digest = hashlib.blake2b("\n".join(document).encode(), digest_size=8, salt=b"fraction").digest()
        return int.from_bytes(digest, "big") < fraction * 2**64

    def read(split: Split) -> Iterator[Document]:
        return corpus.documents(split) if split == "heldout" else filter(chosen, corpus.documents(split))

    return Corpus(digest_of("fraction", corpus.fingerprint, fraction), corpus.size, read)


def to_documents(text: str) -> Iterator[Document]:
    """The non-empty lines of a text as one document, or as several of at most a million characters."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    if len(text) <= _LONGEST:
        if lines:
            yield lines
        return
    part: Document = []
    length = 0
    for line in lines:
        for start in range(0, len(line), _LONGEST):
            piece = line[start : start + _LONGEST]
            if part and length + len(piece) > _LONGEST:
                yield part
                part, length = [], 0
            part.append(piece)
            length += len(piece)
    yield part


def digest_of(*values: Any) -> str:
    """The hex digest of JSON-ready values."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def local_folder(cache_dir: str) -> pathlib.Path:
    """The folder `data.cache_dir`; of one in a bucket, the folder with this host's copies.

    Raises:
      UserError: it lies in a home directory, and there is none.
    """
    try:
        if in_a_bucket(cache_dir):
            return pathlib.Path(COPIES).expanduser() / urllib.parse.quote(cache_dir.rstrip("/"), safe="")
        return pathlib.Path(cache_dir).expanduser()
    except RuntimeError as error:  # a container may know no home
        raise UserError(
            f"data.cache_dir={cache_dir}: there is no home directory: set HOME, or name a folder"
        ) from error


def cache_folder(cache_dir: str) -> pathlib.Path:
    """`local_folder(cache_dir)`, made if it is not there.

    Raises:
      UserError: it cannot be made or written.
    """
    folder = local_folder(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        where = f"its copy in {folder} " if in_a_bucket(cache_dir) else ""
        raise UserError(
            f"data.cache_dir={cache_dir}: {where}cannot be written ({error.strerror}); "
            "name another folder, such as --config.data.cache_dir=/tmp/convattn"
        ) from error
    return folder


def write_atomically(path: epath.PathLike, content: bytes) -> None:
    """Writes a file so that nobody ever sees a part of it."""
    if in_a_bucket(path):
        epath.Path(path).write_bytes(content)
        return
    path = pathlib.Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = pathlib.Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
