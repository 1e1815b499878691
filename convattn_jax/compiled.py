"""Compiled programs, kept between runs: a run that starts again takes its first step in seconds."""

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from convattn_jax.config import UserError, check
from convattn_jax.data import bucket

log = logging.getLogger(__name__)

DEFAULT = "~/.cache/convattn_jax/compiled"
LIMIT = 8 * 2**30  # bytes; what hasn't been read for longest goes first
LEAST_SECONDS = 0.1  # what compiles faster isn't worth a file


def keep(folder: str | None) -> pathlib.Path | None:
    """Has JAX look in `folder` before it compiles, and leave there what it has compiled; empty: nowhere.

    None is the default folder, unless JAX's own environment variable JAX_COMPILATION_CACHE_DIR names one. Programs for
    different processors don't meet: code for one may not run on another that shares the home directory.

    In a bucket nothing is taken away, for it doesn't tell what was read; its own rules of life cycle can.

    Returns:
      The part of a local folder that is this processor's, pruned; None where there is none, or it is not ours to prune.

    Raises:
      UserError: the folder that was asked for cannot be written.
    """
    if folder is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    if folder == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if folder and bucket.in_a_bucket(folder):
        inside = bucket.opened(folder) / processor()
        bucket.check_writable(inside, "--compile_cache")
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA itself knows local folders only
        _use(str(inside))
        return None
    try:
        inside = pathlib.Path(folder or DEFAULT).expanduser() / processor()
    except RuntimeError:  # a container may know no home
        check(folder is None, f"--compile_cache={folder}: there is no home directory: name another folder, or none")
        log.warning("compiled programs are not kept: there is no home directory; name a folder by --compile_cache")
        return None
    try:
        inside.mkdir(parents=True, exist_ok=True)
        prune(inside, LIMIT)
        if not os.access(inside, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        reason = f"{inside} cannot be written: {error.strerror}"
        if folder:
            raise UserError(f"--compile_cache={folder}: {reason}; name another folder, or none") from error
        log.warning("compiled programs are not kept: %s", reason)
        return None
    _use(str(inside))
    return inside


def _use(folder: str) -> None:
    compilation_cache.reset_cache()  # it takes no other folder once it has been used
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def options() -> dict[str, str | bool] | None:
    """XLA's, for steps of models: on GPUs no matrix products by Triton.

    cuBLAS's own add biases, and sums of gradients, as they write. XLA tries Triton's first, and where they lose, those
    additions are left as passes of their own over the results. The search also is half of all compilation.
    """
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """For lowering a program that draws many random arrays: on GPUs the same numbers by JAX's own kernel.

    As operations, 20 rounds for each array, BERT-base's initial parameters take XLA twice as long as its training step.
    """
    before = jax.config.jax_threefry_gpu_kernel_lowering  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_threefry_gpu_kernel_lowering", True)
    try:
        yield
    finally:
        jax.config.update("jax_threefry_gpu_kernel_lowering", before)


def processor() -> str:
    """A name of this host's processor and its instructions."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    digest = hashlib.sha256("\n".join([platform.processor(), *told]).encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"


def prune(folder: pathlib.Path, limit: int) -> None:
    """Removes files, those not used for longest first, until at most `limit` bytes are left."""
    files = []
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process prunes too
            continue
        if path.is_file():
            files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
