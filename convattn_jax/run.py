"""The run folder: what it holds, and whether it belongs to the configuration at hand."""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from convattn_jax import resume
from convattn_jax.config import UserError, check
from convattn_jax.data import bucket, corpus

OWNER = "owner"
LOOKS = 20.0  # seconds between two looks at who owns a folder in a bucket, each of which takes a tenth of one


class RunFolder:
    """config.json, data.json, starts.jsonl, metrics.jsonl, summary.json and checkpoints/ of one run."""

    def __init__(self, path: epath.PathLike):
        self.path = bucket.opened(path)
        self._mark: dict[str, Any] | None = None  # of this process, in a folder that it keeps to itself without a lock
        self._looked = 0.0
        self._written = b""  # what this process knows metrics.jsonl to hold, in a bucket
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"

    def check_belongs(self, config: Mapping[str, Any]) -> list[resume.Change]:
        """The differences to the configuration the folder was made with, all of them allowed by `resume.allow`.

        Raises:
          UserError: there is another difference, or checkpoints without a config.json; it names the first.
        """
        stored = self.read("config")
        if stored is not None:
            return resume.changes(stored, config, self.path)
        check(
            not self.checkpoints.exists(),
            f"{self.path} holds checkpoints but no config.json: restore it, or choose another --workdir",
        )
        return []

    def adopt(self, config: Mapping[str, Any], changes: Iterable[resume.Change]) -> None:
        """Makes the folder one of a changed configuration; changes.jsonl keeps what it was."""
        changes = list(changes)
        if changes:
            _add_lines(self.path / "changes.jsonl", map(dataclasses.asdict, changes))
            self.write("config", config)

    def started(self, facts: Mapping[str, Any]) -> None:
        """Adds a line to starts.jsonl: since when, and by what, what follows is made."""
        _add_lines(self.path / "starts.jsonl", [facts])

    def check_writable(self) -> None:
        """Raises a `UserError` unless files can be made in the folder; leaves nothing behind."""
        if bucket.in_a_bucket(self.path):
            bucket.check_writable(self.path, "--workdir")
            return
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(f"--workdir={self.path} cannot be written: {error.strerror}; choose another") from error
        finally:
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()

    def started_with(self) -> dict[str, Any] | None:
        """What data.json says of the token rows of this run; None before there is a config.json, written last."""
        return read_json(self.path / "data.json") if (self.path / "config.json").exists() else None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out of a local folder; the kernel lets go of it even when this one is killed.

        In a bucket, which has no locks and can't tell the killed from the living, who comes last takes the folder over,
        and who was there before ends with a `UserError` at its next `write` or `append`.

        Raises:
          UserError: another process is at work in the folder.
        """
        if bucket.in_a_bucket(self.path):
            mark = {"mark": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
            self.write(OWNER, mark)
            self._mark = mark
            try:
                yield
            finally:
                self._mark = None
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise UserError(
                f"{self.path} is in use by another process: wait for it, or choose another --workdir"
            ) from error
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            os.close(handle)

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes NAME.json, all or nothing."""
        self._check_owned()
        write_atomically(self.path / f"{name}.json", json.dumps(value, indent=2) + "\n")

    def read(self, name: str) -> dict[str, Any] | None:
        """The contents of NAME.json, or None."""
        file = self.path / f"{name}.json"
        if not file.exists():
            return None
        return resume.completed(read_json(file)) if name == "config" else read_json(file)

    def rows(self) -> list[dict[str, float | int]]:
        """The rows of metrics.jsonl; a last line cut short by a killed process is left out."""
        return list(_parsed(self._content().splitlines()))

    def keep_rows(self, last_step: int) -> list[dict[str, float | int]]:
        """Drops the rows after a step, so that each step stands there once when training goes on from it."""
        rows = [row for row in self.rows() if row["step"] <= last_step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.metrics, text)
        self._written = text.encode()
        return rows

    def append(self, row: Mapping[str, float | int]) -> None:
        """Adds a row to metrics.jsonl; in a bucket it is written anew."""
        if not bucket.in_a_bucket(self.path):
            _add_lines(self.metrics, [row])
            return
        if time.monotonic() - self._looked > LOOKS:
            self._check_owned()
        self._written = (self._written or self._content()) + json.dumps(row).encode() + b"\n"
        corpus.write_atomically(self.metrics, self._written)

    def _content(self) -> bytes:
        return self.metrics.read_bytes() if self.metrics.exists() else b""

    def _check_owned(self) -> None:
        self._looked = time.monotonic()
        owner = self.read(OWNER) if self._mark else None
        if self._mark is not None and owner is not None and owner != self._mark:
            who = f"process {owner.get('process')} on {owner.get('host')}"
            raise UserError(f"{self.path} was taken over by {who}: end one of the two, or choose another --workdir")


def _add_lines(path: epath.Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines of JSON to a file; in a bucket it is written anew."""
    lines = "".join(json.dumps(value) + "\n" for value in values)
    if bucket.in_a_bucket(path):
        write_atomically(path, (path.read_text() if path.exists() else "") + lines)
        return
    with path.open("a") as file:
        file.write(lines)


def _parsed(lines: Iterable[bytes]):
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        yield row


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): is it a run folder of this program?") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: is it a run folder of this program?")
    return value


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file so that a reader finds the old contents or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_atomically(path, text.encode())
