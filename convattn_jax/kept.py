"""Whole programs, kept beside JAX's own: a run that starts again neither traces nor lowers its model.

JAX's cache spares XLA's work, but finds a program by its text, and so traces and lowers it first. Here it is found by
all that the text is a function of (`determinants`): a `Kept` makes its maker from exactly the arguments that it tells
of, and programs come from the maker alone, so that nothing a program holds can be missing from its name.

Reading runs what was written, as with JAX's cache: the folder must be the user's, and writable by nobody else.
"""

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import pathlib
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax.experimental import serialize_executable

from convattn_jax import determinants
from convattn_jax.data.corpus import write_atomically

log = logging.getLogger(__name__)

T = TypeVar("T")
V = TypeVar("V")

PLATFORMS = ("cpu",)  # where it was tried
FOLDER = "whole"  # of the folder of compiled programs, with which it is pruned
HIT = "/jax/compilation_cache/cache_hits"
WAITED = "/convattn_jax/kept/waited"  # told to jax.monitoring: seconds until a program that was kept could be called


class _Place(NamedTuple):
    folder: pathlib.Path
    config_file: str


_place: _Place | None = None
_readers = concurrent.futures.ThreadPoolExecutor(1, "read-program")


def use(folder: pathlib.Path | None, config_file: str = "") -> None:
    """Has programs made from now on looked up, and kept, in a part of `folder`; None: nowhere.

    `config_file` is the Python file that made the configuration. A folder that others can write is not used.
    """
    global _place
    _place = None
    if folder is not None:
        inside = folder / FOLDER
        try:
            inside.mkdir(mode=0o700, exist_ok=True)
            if _is_private(inside):
                _place = _Place(inside, config_file)
            else:
                log.warning("whole programs are not kept: others can write %s", inside)
        except OSError as error:
            log.warning("whole programs are not kept: %s: %s", inside, error.strerror)


def _is_private(folder: pathlib.Path) -> bool:
    stat = folder.stat()
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


class Kept(Generic[T]):
    """`made`, which is `make(*arguments)`, and what was compiled of it, by name.

    Several processes, devices of other kinds than `PLATFORMS`, and who is not `wanted` keep nothing: each program is
    compiled.
    """

    def __init__(self, make: Callable[..., T], *arguments: Any, devices: Sequence[Any], wanted: bool = True):
        self.made = make(*arguments)
        self._devices, self._found = list(devices), {}
        self._reading: dict[str, concurrent.futures.Future[Any]] = {}
        self._path: pathlib.Path | None = None
        if _place and wanted and jax.process_count() == 1 and jax.default_backend() in PLATFORMS:
            name = determinants.digest((f"{make.__module__}.{make.__qualname__}", arguments), _place.config_file)
            self._path = _place.folder / name

    def ahead(self, name: str) -> None:
        """Begins to read a program that will be wanted, in another thread."""
        self._reading[name] = _readers.submit(self._read, name, self._loaded)

    def program(self, name: str, lower: Callable[[T], jax.stages.Lowered]) -> jax.stages.Compiled:
        """The program that `lower(made)` compiles to; `lower` is a function of what it is given alone."""
        if name not in self._found:
            began, reading = time.monotonic(), self._reading.pop(name, None)
            program = reading.result() if reading else self._read(name, self._loaded)
            if program is not None:
                jax.monitoring.record_event_duration_secs(WAITED, time.monotonic() - began)
            self._found[name] = self._compiled(name, lower) if program is None else program
        return self._found[name]

    def value(self, name: str, of: Callable[[T], V]) -> V:
        """`of(made)`, which can be pickled and takes time to find out."""
        value = self._read(name, lambda stored: stored)
        if value is None:
            with _said() as said:
                value = of(self.made)
            self._write(name, said, lambda: value)
        return value

    def _compiled(self, name: str, lower: Callable[[T], jax.stages.Lowered]) -> jax.stages.Compiled:
        with _cache_hits() as hits, _said() as said:
            program = lower(self.made).compile()
        if not hits:  # XLA can't write again, for CPUs, what it has read
            self._write(name, said, lambda: serialize_executable.serialize(program))
        return program

    def _loaded(self, stored: Any) -> jax.stages.Compiled:
        return serialize_executable.deserialize_and_load(*stored, execution_devices=self._devices)

    def _file(self, name: str) -> pathlib.Path | None:
        return self._path and self._path.with_name(f"{self._path.name}-{name}")

    def _read(self, name: str, decode: Callable[[Any], V]) -> V | None:
        """What was kept by this name; None, and a line in the log, where that can't be had."""
        path = self._file(name)
        if path is None or not path.exists():
            return None
        try:
            content = path.read_bytes()
            if content[:32] != _seal(path, content[32:]):
                raise ValueError("it is damaged")
            said, stored = pickle.loads(content[32:])
            value = decode(stored)
        except Exception as error:  # whatever keeps it from being loaded, it can be compiled
            reason = " ".join(str(error).split())[:200]
            log.warning("a kept program cannot be read (%s: %s): compiling it anew", path, reason)
            with contextlib.suppress(OSError):  # where JAX's cache has the program, no other would be written
                path.unlink()
            return None
        for logger, level, message in said:
            logging.getLogger(logger).log(level, "%s", message)
        return value

    def _write(self, name: str, said: list[tuple[str, int, str]], content: Callable[[], Any]) -> None:
        path = self._file(name)
        if path is None:
            return
        try:
            data = pickle.dumps((said, content()))
            write_atomically(path, _seal(path, data) + data)
        except Exception as error:  # what holds calls back to Python can't be written; nor need a disk have room
            reason = " ".join(str(error).split())[:200]
            log.warning("a program is not kept (%s: %s)", name, reason)


def _seal(path: pathlib.Path, data: bytes) -> bytes:
    """A digest of a file and of its name, under which alone it is what it says."""
    return hashlib.sha256(path.name.encode() + data).digest()


@contextlib.contextmanager
def _said() -> Iterator[list[tuple[str, int, str]]]:
    """(logger, level, message) of what this package warns of within the block, such as of a kernel that can't serve."""
    records: list[tuple[str, int, str]] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append((record.name, record.levelno, record.getMessage()))
    package = logging.getLogger(__name__.partition(".")[0])
    package.addHandler(handler)
    try:
        yield records
    finally:
        package.removeHandler(handler)


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """What this thread found in JAX's own cache within the block."""
    hits, thread = [], threading.get_ident()

    def heard(event: str, **_: str | int) -> None:
        if event == HIT and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(heard)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(heard)
