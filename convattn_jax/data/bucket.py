"""Paths in buckets, gs://...: objects appear whole, can't be extended, and know no locks."""

import contextlib
import logging
import re
import sys
import threading
import uuid
from collections.abc import Iterator

from etils import epath

from convattn_jax.config import UserError, check

SCHEMES = ("gs", "s3")  # that both the path layer and TensorStore, which writes the arrays of checkpoints, know
LOGIN = "check the network, log in (gcloud auth application-default login), or let the service account into the bucket"
SILENCE = 8  # seconds without an answer
_LIBRARIES = ("gcsfs", "fsspec", "s3fs", "aiohttp", "google", "requests", "botocore", "tensorflow")


def in_a_bucket(path: epath.PathLike) -> bool:
    """Whether a path is gs://... or the like."""
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    """A path from the root on; epath itself takes gs://... for one that begins in the working directory."""
    return path if in_a_bucket(path) else path.absolute()


def opened(path: epath.PathLike) -> epath.Path:
    """The path; of a bucket no listing is remembered, for TensorStore and other hosts write there too."""
    if in_a_bucket(path):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, too
        import fsspec.config

        for scheme in ("gs", "gcs", "s3"):
            fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(path)


@contextlib.contextmanager
def explained(field: str, path: epath.PathLike) -> Iterator[None]:
    """Turns what the storage of a bucket, or the lack of a library for it, says into one line for the user."""
    scheme = str(path).partition("://")[0]
    try:
        if in_a_bucket(path):
            check(scheme in SCHEMES, f"{field}={path}: buckets are {' or '.join(f'{known}://' for known in SCHEMES)}")
            named = re.match("[a-z0-9]", str(path).partition("://")[2])
            check(named is not None, f"{field}={path} names no bucket: write {scheme}://BUCKET/FOLDER")
        yield
    except ImportError as error:
        if not in_a_bucket(path):
            raise
        extra = "'convattn_jax[gcs]'" if scheme == "gs" else "'etils[epath-s3]'"
        raise UserError(f"{field}={path} needs a library: pip install {extra} ({line(error)})") from error
    except Exception as error:
        if not in_a_bucket(path) or not is_of_storage(error):
            raise
        raise UserError(f"{field}={path} cannot be reached ({line(error)}): {LOGIN}") from error


@contextlib.contextmanager
def patience(field: str, path: epath.PathLike) -> Iterator[None]:
    """Says that an answer is waited for: without a network, libraries try again for most of a minute."""
    timer = threading.Timer(SILENCE, print, (f"{field}={path}: waiting for an answer",), {"file": sys.stderr})
    timer.daemon = True
    if in_a_bucket(path):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_writable(folder: epath.Path, field: str) -> None:
    """Raises a `UserError` unless objects can be made in a folder of a bucket; leaves nothing behind."""
    probe = folder / f".probe-{uuid.uuid4().hex[:12]}"
    with explained(field, folder):
        try:
            probe.write_bytes(b"")
        except FileNotFoundError as error:
            bucket = "/".join(str(folder).split("/")[:3])
            raise UserError(
                f"{field}={folder}: there is no bucket {bucket}: make it (gcloud storage buckets create {bucket}), or "
                "name another"
            ) from error
        with contextlib.suppress(OSError):  # who may make objects may not always take them away
            probe.unlink()


def is_of_storage(error: Exception) -> bool:
    """Whether an exception comes from the storage behind a path and not from a mistake in the program."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _LIBRARIES


def line(error: Exception) -> str:
    """What an exception says, in one line, not too long."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
