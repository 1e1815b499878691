"""Checkpoints: Orbax writes them in the background, a manifest with digests says which are whole.

`checkpoints/<step>/` holds the items `params` and `rest` (step and optimizer state). Its `manifest.json` comes last,
with the step, its held-out loss, the size and digest of every file and a digest of itself: what it doesn't vouch for is
not loaded, and the step before is taken. Orbax alone would restore a flipped bit or a renamed folder without a word.
Older checkpoints go only once a newer one is vouched for.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from etils import epath

from convattn_jax import distributed, full_disk
from convattn_jax.config import UserError, check
from convattn_jax.console import human
from convattn_jax.data import bucket
from convattn_jax.train import TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

MANIFEST = "manifest.json"
VERSION = 2  # of the manifest; the first had no version, no digest of its own, and BLAKE2b for the files
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what a killed process was writing
BEST = "eval_loss"  # the metric that decides which checkpoint is kept as the best; the manifest notes it


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; `configs/base.py` documents each key."""

    every_seconds: float
    keep: int

    def __post_init__(self):
        check(self.every_seconds >= 0, f"checkpoint.every_seconds={self.every_seconds} must be 0 or more")
        check(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")


class Saved(NamedTuple):
    """A restored state, and what was noted with it."""

    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """Saves, verifies and restores the train states of one run folder."""

    def __init__(self, folder: epath.PathLike, keep: int):
        self._folder, self._keep = epath.Path(folder), keep
        self._finishing: threading.Thread | None = None
        self._failure: BaseException | None = None

    @functools.cached_property
    def _orbax(self) -> "ocp.AsyncCheckpointer":
        """Made with the first checkpoint that is read or written: importing Orbax would delay every start."""
        import orbax.checkpoint as ocp

        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float | int] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts saving; returns once the arrays are copied. An earlier save's failure is raised here.

        `notes` is JSON that comes back with the state.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = int(np.asarray(state.step).flat[0])  # of seeds that train together each has one
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
        )
        try:
            self._orbax.save(self._path(step), args=items, force=True)  # in place of a damaged one, if there is any
        except (OSError, ValueError) as error:  # the second is TensorStore's
            raise unwritten(self._folder, error) from error
        loss = (metrics or {}).get(BEST)
        self._finishing = threading.Thread(target=self._finish, args=(step, loss, notes), daemon=True)
        self._finishing.start()

    def _finish(self, step: int, loss: float | None, notes: Mapping[str, Any] | None) -> None:
        try:
            self._orbax.wait_until_finished()
            if distributed.first_process():
                write_manifest(self._folder / str(step), step, loss, notes)
                for path in surplus(self._folder, step, self._keep):
                    _remove(path)
        except BaseException as failure:
            self._failure = failure

    def wait(self) -> None:
        """Returns when the last save is whole on disk, or raises what kept it from being so."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        self.check()

    def check(self) -> None:
        """Raises what has kept a save from its end so far; doesn't wait for one that is under way."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise unwritten(self._folder, failure) from failure

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            try:
                if "_orbax" in vars(self):
                    self._orbax.close()
            except (OSError, ValueError) as error:  # tells of a save that failed once more
                raise unwritten(self._folder, error) from error

    def restore(self, like: TrainState, report: Callable[[str], None] = lambda line: None) -> Saved | None:
        """The newest whole state, in the shapes and shardings of `like`; damaged ones are reported and passed over."""
        step = distributed.from_first(lambda: self._cleared(report))
        if step is None:
            if steps_of(self._folder):
                report("no checkpoint is whole: training starts from the beginning")
            return None
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            rest=ocp.args.StandardRestore({"step": like.step, "opt_state": like.opt_state}),
        )
        restored = self._orbax.restore(self._path(step), args=items)
        rest = restored["rest"]
        state = TrainState(step=rest["step"], params=restored["params"], opt_state=rest["opt_state"])
        return Saved(state, notes(self._folder, step))

    def _cleared(self, report: Callable[[str], None]) -> int | None:
        """The newest whole step, once what a killed process was writing is gone: it takes the room of the next one."""
        for path in self._folder.glob(f"*{UNFINISHED}*") if self._folder.exists() else ():
            _remove(path)
        return newest_whole(self._folder, report)

    def _path(self, step: int) -> epath.Path:
        return bucket.absolute(self._folder / str(step))  # Orbax takes no other


def check_room(folder: epath.Path, keep: int, like: TrainState) -> None:
    """Raises a `UserError` where the disk can't hold the checkpoints that a run keeps, the best and the next.

    The folder need not be there yet.
    """
    if bucket.in_a_bucket(folder):
        return
    local = pathlib.Path(folder).absolute()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    taken = sum(path.stat().st_size for path in local.rglob("*") if path.is_file())
    there = next(path for path in (local, *local.parents) if path.exists())
    needed, free = (keep + 2) * size - taken, shutil.disk_usage(there).free
    check(
        free >= needed,
        f"--workdir: {folder} has room for {human(free)}B, and {keep + 2} checkpoints of {human(size)}B need "
        f"{human(needed)}B more: make room there, lower checkpoint.keep, or choose another",
    )


def unwritten(folder: epath.Path, failure: BaseException) -> UserError:
    """What to tell of a save that failed."""
    if isinstance(failure, UserError):  # which says it already
        return failure
    if alone := distributed.alone(failure):
        return alone
    said = " ".join(str(failure).split()) or type(failure).__name__
    text = full_disk.reason(failure) or said[:300]  # TensorStore says it at great length
    remedy = bucket.LOGIN if bucket.in_a_bucket(folder) else "make room there"
    return UserError(f"--workdir: no checkpoint could be written to {folder} ({text}): {remedy}")


def save_params(folder: epath.PathLike, step: int, params: Any) -> None:
    """Writes parameters alone as the checkpoint of a step, whole when it returns; an older one of that step goes.

    Of several processes one does so, with arrays of the host.

    Raises:
      UserError: it can't be written.
    """
    path = epath.Path(folder) / str(step)
    if path.exists():
        path.rmtree()
    try:
        with _of_this_process() as orbax:
            orbax.save(bucket.absolute(path / "params"), params)
        write_manifest(path, step)
    except (OSError, ValueError) as error:  # the second is TensorStore's
        raise unwritten(path, error) from error


def newest_params(folder: epath.PathLike, like: Any) -> tuple[int, Any]:
    """The newest whole checkpoint's step and parameters.

    Raises:
      UserError: there is no whole checkpoint in the folder.
    """
    step = newest_whole(folder)
    if step is None:
        raise UserError(f"{folder} holds no whole checkpoint: has the run saved one yet?")
    return step, _params(epath.Path(folder) / str(step), like)


def load_params(folder: epath.PathLike, like: Any, step: int) -> Any:
    """The parameters alone of a step.

    Raises:
      UserError: its checkpoint is not whole.
    """
    path = epath.Path(folder) / str(step)
    check(damage(path) is None, f"{folder} holds no whole checkpoint of step {step}: has the run saved it yet?")
    return _params(path, like)


def _params(path: epath.Path, like: Any) -> Any:
    if jax.process_count() > 1:  # every process reads them, as arrays of its host
        like = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), like)
    with _of_this_process() as orbax:
        return orbax.restore(bucket.absolute(path / "params"), like)


def _of_this_process() -> "ocp.StandardCheckpointer":
    """Reads and writes without the other processes, for which Orbax would wait."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(this, active_processes={this}, barrier_sync_key_prefix=f"of {this}")
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def digest(folder: epath.PathLike, step: int) -> str:
    """What stands for all files of a step's checkpoint; empty if it has no manifest, or one of the first version."""
    return _manifest_of(epath.Path(folder) / str(step)).get("digest", "")


def steps_of(folder: epath.Path) -> list[int]:
    """The steps saved in a folder, whole or not, oldest first."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def newest_whole(folder: epath.PathLike, report: Callable[[str], None] = lambda line: None) -> int | None:
    """The last step whose files agree with their manifest."""
    folder = epath.Path(folder)
    for step in reversed(steps_of(folder)):
        problem = damage(folder / str(step))
        if problem is None:
            return step
        report(f"checkpoint {step} is damaged ({problem}): passed over")
    return None


def notes(folder: epath.PathLike, step: int) -> dict[str, Any]:
    """What was noted with a checkpoint."""
    return _manifest_of(epath.Path(folder) / str(step)).get("notes") or {}


def surplus(folder: epath.Path, step: int, keep: int) -> list[epath.Path]:
    """What can go once `step` is saved: all but the newest `keep` checkpoints and the best up to here.

    Later ones stay, damaged as they must be: training will write them anew.
    """
    manifests = {saved: _manifest_of(folder / str(saved)) for saved in steps_of(folder) if saved <= step}
    whole = [saved for saved, manifest in manifests.items() if manifest.get("step") == saved]
    losses = {saved: manifests[saved][BEST] for saved in whole if manifests[saved].get(BEST) is not None}
    kept = {*whole[-keep:], min(losses, key=lambda saved: losses[saved], default=step)}
    return [folder / str(saved) for saved in manifests if saved not in kept] + list(folder.glob(f"*{UNFINISHED}*"))


def write_manifest(
    folder: epath.Path, step: int, loss: float | None = None, notes: Mapping[str, Any] | None = None
) -> None:
    """Vouches for every file of a finished checkpoint, and notes its held-out loss if that was measured."""
    files = {name: {"size": size, "digest": digest} for name, size, digest in _files(folder, _sha256, durable=True)}
    manifest = {"version": VERSION, "step": step, BEST: loss, "notes": dict(notes or {}), "files": files}
    content = json.dumps({**manifest, "digest": _digest(manifest)}, indent=1)
    if bucket.in_a_bucket(folder):  # where a file appears whole, and a rename need not
        (folder / MANIFEST).write_text(content)
        return
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(content)
    _to_disk(temporary)
    temporary.rename(folder / MANIFEST)


def damage(folder: epath.Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (folder / MANIFEST).exists():
        return "it was not finished"
    manifest = _manifest_of(folder)
    step, files = manifest.get("step"), manifest.get("files")
    first_version = set(manifest) == {"step", BEST, "files"}
    content = {key: value for key, value in manifest.items() if key != "digest"}
    vouched = first_version or manifest.get("digest") == _digest(content)
    if not vouched or step is None or not isinstance(files, dict):
        return f"{MANIFEST} is unreadable"
    if str(step) != folder.name:
        return f"it is of step {step}"
    try:
        with bucket.explained("--workdir", folder):  # a bucket out of reach is no damage
            found = {
                name: {"size": size, "digest": digest}
                for name, size, digest in _files(folder, _blake2b if first_version else _sha256)
            }
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    for name in sorted(files.keys() | found.keys()):
        if files.get(name) != found.get(name):
            kind = "missing" if name not in found else "unknown" if name not in files else "changed"
            return f"{name} is {kind}"
    return None


def _remove(path: epath.Path) -> None:
    """Removes a folder; what can't go now goes with a later one."""
    try:
        path.rmtree()
    except Exception as error:
        if not bucket.is_of_storage(error):
            raise


def _manifest_of(folder: epath.Path) -> dict[str, Any]:
    """The manifest of a checkpoint; empty if it can't be read."""
    try:
        with bucket.explained("--workdir", folder):
            text = (folder / MANIFEST).read_text() if (folder / MANIFEST).exists() else ""
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256() -> Any:
    return hashlib.sha256()  # 1.9 GB/s where the processor has instructions for it, BLAKE2b 1.1


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=16)


def _files(folder: epath.Path, algorithm: Callable[[], Any], durable: bool = False) -> Iterator[tuple[str, int, str]]:
    """(relative name, size, digest) of every file but the manifest; a link counts as a file without contents.

    With `durable` they are on the disk, not only in its cache, when the names have all been given.
    """
    stack = [folder]
    while stack:
        for path in sorted(stack.pop().iterdir()):
            if os.path.islink(path):
                yield os.path.relpath(path, folder), 0, "a link"
            elif path.is_dir():
                stack.append(path)
            elif not path.name.startswith(MANIFEST):
                digest, size = algorithm(), 0
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                        size += len(block)
                if durable:
                    _to_disk(path)
                yield os.path.relpath(path, folder), size, digest.hexdigest()


def _to_disk(path: epath.Path) -> None:
    """Waits until a local file is on its disk; storage in a bucket is when it is closed."""
    if bucket.in_a_bucket(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
