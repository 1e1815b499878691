"""Caches in a bucket: what one host prepared, others copy to a local disk, where it can be mapped into memory.

A folder of the cache is uploaded file by file; `whole.json` comes last, with the folder's name, the size and SHA-256 of
every file and a digest of itself. What it doesn't vouch for is not used: it is prepared again, and replaced.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from convattn_jax.config import UserError
from convattn_jax.data import bucket, cache
from convattn_jax.data.corpus import Report, cache_folder, local_folder

VOUCHER = "whole.json"
_BLOCK = 1 << 23  # bytes copied at a time


class _DamagedError(Exception):
    """Files in the bucket that are not what their voucher says."""


def obtain(cache_dir: str, name: str, make: Callable[[pathlib.Path], None], report: Report) -> pathlib.Path:
    """The folder `name` of the cache on a local disk: found there, copied from the bucket, or made.

    In a bucket it is left for others, unless it is there already.

    Raises:
      UserError: the cache can't be read or written.
    """
    folder = cache_folder(cache_dir) / name
    if not found(cache_dir, name, report):
        with cache.new_folder(folder) as partial:
            make(partial)
    if bucket.in_a_bucket(cache_dir):
        _share(folder, _remote(cache_dir, name), report)
    return folder


def found(cache_dir: str, name: str, report: Report) -> bool:
    """Whether the cache has a folder; one that only the bucket has is on a local disk afterwards."""
    folder = local_folder(cache_dir) / name
    if folder.exists() or not bucket.in_a_bucket(cache_dir):
        return folder.exists()
    remote = _remote(cache_dir, name)
    try:
        with bucket.explained("data.cache_dir", cache_dir):
            files = _vouched(remote)
        if files is None:
            return False
        with cache.new_folder(folder) as partial:
            _fetch(remote, files, partial, report)
    except _DamagedError as problem:
        report(f"{remote} is damaged ({problem}): it is prepared again", 0, 0)
        with contextlib.suppress(UserError), bucket.explained("data.cache_dir", cache_dir):
            (remote / VOUCHER).unlink(missing_ok=True)  # so that it is replaced
        return False
    return True


def check_reached(cache_dir: str) -> None:
    """Raises a `UserError` unless a cache in a bucket can be read; a folder that is not there yet can be made."""
    if bucket.in_a_bucket(cache_dir):
        with bucket.explained("data.cache_dir", cache_dir):
            there = bucket.opened(cache_dir).exists()
        if not there:
            bucket.check_writable(epath.Path(cache_dir), "data.cache_dir")


def _remote(cache_dir: str, name: str) -> epath.Path:
    return bucket.opened(cache_dir.rstrip("/")) / name


def _vouched(remote: epath.Path) -> Mapping[str, Mapping[str, Any]] | None:
    """{file: its size and digest} of a folder in the bucket; None where nothing vouches for it (yet)."""
    if not (remote / VOUCHER).exists():
        return None
    try:
        voucher = json.loads((remote / VOUCHER).read_bytes())
        files = voucher["files"]
        if voucher != _voucher(remote.name, files) or any(pathlib.PurePosixPath(name).name != name for name in files):
            raise ValueError
        return {name: {"size": int(file["size"]), "sha256": str(file["sha256"])} for name, file in files.items()}
    except FileNotFoundError:  # another host takes it away
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedError(f"{VOUCHER} is unreadable") from error


def _voucher(name: str, files: Mapping[str, Any]) -> dict[str, Any]:
    content = {"name": name, "files": files}
    return {**content, "digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _fetch(remote: epath.Path, files: Mapping[str, Mapping[str, Any]], folder: pathlib.Path, report: Report) -> None:
    """Copies the files out of the bucket; raises `_DamagedError` where they are not what is vouched for."""
    total, done = sum(file["size"] for file in files.values()), 0
    for name, told in files.items():
        digest, size = hashlib.sha256(), 0
        with cache.errors(folder.parent):
            target = (folder / name).open("wb", buffering=0)
        try:
            with target, bucket.explained("data.cache_dir", remote), (remote / name).open("rb") as source:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    size += len(block)
                    done += len(block)
                    with cache.errors(folder.parent):
                        cache.write_all(target, block)
                    report(f"copying {remote}", min(done, total - 1), total)
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _DamagedError(f"{name} is missing") from error
            raise
        if {"size": size, "sha256": digest.hexdigest()} != told:
            raise _DamagedError(f"{name} is changed")
    report(f"copying {remote}", total, total)


def _share(folder: pathlib.Path, remote: epath.Path, report: Report) -> None:
    """Uploads a folder unless the bucket has it; a bucket that takes nothing is no reason to stop."""
    try:
        with bucket.explained("data.cache_dir", remote):
            if (remote / VOUCHER).exists():
                return
            files = {}
            paths = sorted(folder.iterdir())
            total = sum(path.stat().st_size for path in paths)
            done = 0
            for path in paths:
                digest, size = hashlib.sha256(), 0
                with path.open("rb") as source, (remote / path.name).open("wb") as target:
                    while block := source.read(_BLOCK):
                        target.write(block)
                        digest.update(block)
                        size += len(block)
                        done += len(block)
                        report(f"uploading {remote}", min(done, total - 1), total)
                files[path.name] = {"size": size, "sha256": digest.hexdigest()}
            (remote / VOUCHER).write_bytes(json.dumps(_voucher(remote.name, files), indent=1).encode())
            report(f"uploading {remote}", total, total)
    except UserError as error:
        report(f"not kept for other hosts: {error}", 0, 0)
