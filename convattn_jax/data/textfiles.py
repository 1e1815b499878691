"""Text in files: .txt and .jsonl, plain or compressed, local or in a bucket, read as a stream of documents."""

import gzip
import hashlib
import json
import lzma
import os
import pathlib
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from etils import epath

from convattn_jax.config import UserError, check
from convattn_jax.data import bucket
from convattn_jax.data.corpus import (
    Corpus,
    Document,
    Report,
    Split,
    cache_folder,
    digest_of,
    select,
    to_documents,
    write_atomically,
)

_VERSION = 1  # of the way files become documents; part of the fingerprint
_CHUNK = 1 << 20  # bytes read at a time
_LONGEST_LINE = 1 << 24  # bytes after which a line of plain text is cut
_SUFFIXES = "known: .txt and .jsonl, each also as .gz, .xz or .zst"
_MAGIC = re.compile(r"[*?\[]")
_SETTLED = 2.0  # seconds after which a file's time stamp is trusted to tell a later change


def open_files(
    files: Sequence[str], heldout_files: Sequence[str], heldout_fraction: float, cache_dir: str, report: Report
) -> Corpus:
    """The corpus of text files and patterns; without `heldout_files` its documents are split by hash of their text.

    Raises:
      UserError: nothing matches, a file is missing, of unknown kind or unreadable, or stands in both splits.
    """
    train = find(files, "data.files")
    heldout = find(heldout_files, "data.heldout_files")
    both = sorted(set(map(str, train)) & set(map(str, heldout)))
    check(not both, f"data.heldout_files: {', '.join(both[:1])} is also in data.files; take it out of one of them")
    digests = _digests(train, heldout, cache_folder(cache_dir), report)

    def identity(paths: list[epath.Path]) -> list[Any]:
        return [[digests[str(path)][0], _kind(path)] for path in paths]

    def read(split: Split) -> Iterator[Document]:
        if heldout:
            return _documents(heldout, "data.heldout_files") if split == "heldout" else _documents(train, "data.files")
        return select(_documents(train, "data.files"), split, heldout_fraction)

    held = identity(heldout) if heldout else heldout_fraction
    fingerprint = digest_of("text", _VERSION, identity(train), held)
    return Corpus(fingerprint, sum(size for _, size in digests.values()), read)


def find(patterns: Sequence[str], field: str) -> list[epath.Path]:
    """The files that paths and glob patterns name, sorted, each once."""
    found = {str(path): path for pattern in patterns for path in _expand(pattern, field)}
    for path in found.values():
        _kind(path, field)
        if path.name.endswith(".zst"):
            _zstandard(field)
    return [found[name] for name in sorted(found)]


def _expand(pattern: str, field: str) -> list[epath.Path]:
    path = bucket.opened(pattern).expanduser()
    try:
        if path.is_dir():
            raise UserError(f"{field}: {pattern} is a folder: name its files, such as {pattern.rstrip('/')}/*.txt")
        if path.exists():
            return [bucket.absolute(path)]
        check(_MAGIC.search(pattern) is not None, f"{field}: {pattern} is not there; name a file or a pattern")
        fixed = next(i for i, part in enumerate(path.parts) if _MAGIC.search(part))
        root = epath.Path(*path.parts[:fixed]) if fixed else epath.Path(".")
        matches = [bucket.absolute(match) for match in root.glob("/".join(path.parts[fixed:])) if not match.is_dir()]
    except ImportError as error:
        raise UserError(
            f"{field}: {pattern} needs the extra gcs: pip install 'convattn_jax[gcs]' ({_line(error)})"
        ) from error
    except UserError:
        raise
    except Exception as error:  # whatever the storage behind the path raises
        raise UserError(f"{field}: {pattern} cannot be looked up ({_line(error)})") from error
    check(bool(matches), f"{field}: no file matches {pattern}")
    return matches


def _kind(path: epath.Path, field: str = "data.files") -> str:
    """`text` or `jsonl`, by the name."""
    name = pathlib.PurePosixPath(path.name)
    inner = pathlib.PurePosixPath(name.stem) if name.suffix in _DECOMPRESS else name
    check(
        inner.suffix in (".txt", ".jsonl") or (inner != name and inner.suffix not in (".tar", ".json")),
        f"{field}: {path} has an unknown suffix; {_SUFFIXES}",
    )
    return "jsonl" if inner.suffix == ".jsonl" else "text"


# --- digests -------------------------------------------------------------------------------------------------------


def _digests(
    train: list[epath.Path], heldout: list[epath.Path], cache: pathlib.Path, report: Report
) -> dict[str, tuple[str, int]]:
    """(digest, size) of each file's bytes; those of unchanged files are remembered in the cache folder."""
    memory_path = cache / "digests.json"
    memory = _read_memory(memory_path)
    fields = {str(path): "data.files" for path in train} | {str(path): "data.heldout_files" for path in heldout}
    stamps = {}
    for name, field in fields.items():
        try:
            stamps[name] = _stamp(name)
        except Exception as error:
            raise UserError(f"{field}: {name} cannot be read ({_line(error)})") from error
    total = sum(size for size, _ in stamps.values())
    digests, done, learnt = {}, 0, False
    for name, (size, modified) in stamps.items():
        known = memory.get(name)
        if isinstance(known, list) and known[:2] == [size, modified]:
            digest = known[2]
        else:
            digest = _digest(name, fields[name], done, total, report)
            if time.time() - modified * 1e-9 > _SETTLED:
                memory[name] = [size, modified, digest]
                learnt = True
        digests[name] = (digest, size)
        done += size
    if learnt:
        write_atomically(memory_path, json.dumps(memory, indent=0).encode())
    return digests


def _read_memory(path: pathlib.Path) -> dict[str, Any]:
    try:
        memory = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _stamp(name: str) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds)."""
    if "://" not in name:
        stat = os.stat(name)
        return stat.st_size, stat.st_mtime_ns
    remote = epath.Path(name).stat()
    return remote.length, int(remote.mtime * 1e9)


def _digest(name: str, field: str, done: int, total: int, report: Report) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with epath.Path(name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                report("reading text", done, total)
    except Exception as error:
        raise UserError(f"{field}: {name} cannot be read ({_line(error)})") from error
    return digest.hexdigest()


# --- documents -----------------------------------------------------------------------------------------------------


def _documents(paths: list[epath.Path], field: str) -> Iterator[Document]:
    for path in paths:
        where = f"{field}: {path}"
        if _kind(path) == "jsonl":
            yield from _jsonl_documents(_lines(_chunks(path, where), None), where)
        else:
            yield from _text_documents(_lines(_chunks(path, where), _LONGEST_LINE), where)


def _text_documents(lines: Iterator[tuple[int, bytes]], where: str) -> Iterator[Document]:
    """Groups lines to documents at blank lines; a document of many lines is passed on in parts."""
    group: list[bytes] = []
    first = size = 0
    for number, line in lines:
        blank = not line or line.isspace()
        if group and (blank or size > _CHUNK):
            yield from to_documents(_decode(group, first, where))
            group, size = [], 0
        if not blank:
            if not group:
                first = number
            group.append(line)
            size += len(line)
    if group:
        yield from to_documents(_decode(group, first, where))


def _decode(group: list[bytes], first: int, where: str) -> str:
    try:
        return b"\n".join(group).decode("utf-8-sig" if first == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first + error.object.count(b"\n", 0, error.start)
        raise UserError(
            f"{where} is not UTF-8 in line {line} ({error.reason}): convert it, such as with iconv -t UTF-8"
        ) from error


def _jsonl_documents(lines: Iterator[tuple[int, bytes]], where: str) -> Iterator[Document]:
    for number, line in lines:
        if not line or line.isspace():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(
                f'{where}, line {number}, is not a JSON object with a "text": one a line, {{"text": "..."}}'
            )
        yield from to_documents(text)


def _lines(chunks: Iterator[bytes], longest: int | None) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each line; one longer than `longest` comes in parts, cut at spaces."""
    number, rest = 1, []
    waiting = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        waiting += len(first)
        if others:
            yield number, b"".join(rest)
            for number, line in enumerate(others[:-1], number + 1):  # noqa: B020
                yield number, line
            number += 1
            rest, waiting = [others[-1]], len(others[-1])
        elif longest is not None and waiting > longest:
            head, space, tail = b"".join(rest).rpartition(b" ")
            if space:
                yield number, head
                rest, waiting = [tail], len(tail)
    yield number, b"".join(rest)


def _chunks(path: epath.Path, where: str) -> Iterator[bytes]:
    """The file's bytes, decompressed, some at a time."""
    decompress = _DECOMPRESS.get(path.suffix, _plain)
    try:
        with path.open("rb") as file:
            yield from decompress(file)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, _BrokenArchiveError) as error:
        raise UserError(f"{where} is broken or cut short ({_line(error)}): fetch or compress it again") from error
    except OSError as error:
        raise UserError(f"{where} cannot be read ({_line(error)})") from error


class _BrokenArchiveError(Exception):
    """A .zst file that does not decompress to its end."""


@runtime_checkable
class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def _plain(file: _Readable) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _gzip(file: _Readable) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=cast(Any, file)) as stream:
        yield from _plain(stream)


def _xz(file: _Readable) -> Iterator[bytes]:
    with lzma.LZMAFile(cast(Any, file)) as stream:
        yield from _plain(stream)


def _zst(file: _Readable) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader takes a cut frame for the end of the file."""
    zstandard = _zstandard("data.files")
    frame = None
    try:
        while compressed := file.read(_CHUNK // 8):
            while compressed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(compressed)
                compressed = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise _BrokenArchiveError(str(error)) from error
    if frame is not None:
        raise _BrokenArchiveError("the last frame is incomplete")


def _zstandard(field: str) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{field}: .zst files need the extra zstd: pip install 'convattn_jax[zstd]'") from error
    return zstandard


_DECOMPRESS = {".gz": _gzip, ".xz": _xz, ".zst": _zst}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
