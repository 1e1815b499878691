"""Folders that appear whole or not at all."""

import contextlib
import fcntl
import io
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from convattn_jax.config import UserError

PARTIAL = ".partial-"


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into that becomes `folder` when the block ends well and goes away when it doesn't.

    It is locked meanwhile, so that what a killed process left can be told from what a living one writes, and removed.
    Where another process made the same folder first, that one stays.

    Raises:
      UserError: the cache can't be written.
    """
    with errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        partial, lock = _locked_folder(folder)
    try:
        yield partial
        with errors(folder.parent):
            _sync(*partial.iterdir(), partial)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def errors(cache: pathlib.Path) -> Iterator[None]:
    """Turns what the file system says into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir={cache}: {error.strerror or error}; name a folder that can be written and has room"
        ) from error


def write_all(file: io.FileIO, content: bytes) -> None:
    """Writes to a raw file, which may take less than all at once."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _locked_folder(folder: pathlib.Path) -> tuple[pathlib.Path, int]:
    while True:
        partial = folder.with_name(f"{folder.name}{PARTIAL}{uuid.uuid4().hex[:12]}")
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover before the lock was there
            continue
        with contextlib.suppress(OSError):  # a file system without locks: leftovers stay
            fcntl.flock(lock, fcntl.LOCK_EX)
        if partial.exists():
            return partial, lock
        os.close(lock)


def _remove_leftovers(cache: pathlib.Path) -> None:
    for partial in cache.glob(f"*{PARTIAL}*"):
        with contextlib.suppress(OSError):
            lock = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(lock)


def _sync(*paths: pathlib.Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
