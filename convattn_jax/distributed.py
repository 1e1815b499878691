"""Several processes as one run: how they find each other, agree, and stop together.

JAX's runtime connects them and moves the arrays. What is said here in words goes through its key-value store, which
waits as long as a host needs to prepare its text; a collective of the devices would give up.
"""

import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import re
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax._src import distributed as runtime  # its key-value store has no public name

from convattn_jax.config import AloneError, Cluster, UserError, check

T = TypeVar("T")

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")  # those that decide about numbers or files
OWN = ("data.cache_dir", "data.workers")  # what each host may set for itself
PATIENCE = 7 * 24 * 3600 * 1000  # ms; a host that has died ends the wait by its missing heartbeat
JOIN_SECONDS = 300  # in which all processes have to come
ALL = "start all of them, with the same address and number of processes"
QUIET_SECONDS = 10  # of waiting for them, before that is said
# What collectives say, and those who wait for another process to have written its part, when it is gone.
GONE = re.compile(r"gloo|nccl|connection (reset|closed|refused)|remote process|timed out while waiting|barrier", re.I)
_turn = itertools.count()


def start(cluster: Cluster, heartbeat_seconds: int = 100) -> None:
    """Joins this process to those that the flags or the environment speak of; where it is alone, it does nothing.

    When it ends it waits for the others; one that has died they miss after `heartbeat_seconds`, and end too.

    Raises:
      UserError: the others can't be reached, or have not all come within `JOIN_SECONDS`.
    """
    method = None if cluster.coordinator else detected(os.environ)
    if jax.distributed.is_initialized() or (method is None and not cluster.coordinator):
        return
    where = f"--coordinator={cluster.coordinator}" if cluster.coordinator else f"the environment ({method})"
    if cluster.process == 0:
        check_port(cluster.coordinator)
    failed: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                cluster.coordinator or None,
                cluster.processes,
                cluster.process,
                cluster_detection_method="deactivate" if cluster.coordinator else None if method == "tpu" else method,
                initialization_timeout=PATIENCE // 1000,  # at its end JAX's runtime aborts the process, stacks and all
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        except Exception as error:
            failed.append(error)

    # A thread of its own waits within the runtime, where no signal reaches Python.
    joining = threading.Thread(target=join, name="join", daemon=True)
    joining.start()
    try:
        joining.join(min(QUIET_SECONDS, JOIN_SECONDS))
        if joining.is_alive():
            print(f"{where}: waiting for the other processes, {JOIN_SECONDS:g} seconds at most", file=sys.stderr)
            joining.join(JOIN_SECONDS)
        check(not joining.is_alive(), f"{where}: the others have not all come within {JOIN_SECONDS:g} seconds: {ALL}")
    except BaseException:
        # The thread keeps what it waits with: taking that down at the exit would print the runtime's stacks.
        runtime.global_state = runtime.State()
        raise
    if failed:
        reason = " ".join(str(failed[0]).split())
        raise UserError(f"{where}: this process could not join the others ({reason}): {ALL}") from failed[0]
    if cluster.processes is not None:
        _check_count(cluster.processes)


def check_port(coordinator: str) -> None:
    """Raises a `UserError` where something listens on the coordinator's port, or this process may not.

    JAX's runtime would crash, or share the port with another run, whose processes then meet these.
    """
    port, both = int(coordinator.rpartition(":")[2]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UserError(
            f"--coordinator={coordinator}: {os.strerror(error.errno or 0)}: another run may listen there; name another "
            "port, the same for all processes"
        ) from error


def _check_count(processes: int) -> None:
    """Raises a `UserError` where processes were told different numbers of them."""
    client, this = runtime.global_state.client, jax.process_index()
    assert client is not None
    client.key_value_set(f"convattn/processes/{this}", str(processes))
    for other in range(1, processes) if this == 0 else (0,):
        told = client.blocking_key_value_get(f"convattn/processes/{other}", 1000 * JOIN_SECONDS)
        check(
            int(told) == processes,
            f"process {this} was told --processes={processes}, process {other} --processes={told}: all need the same",
        )


def alone(error: BaseException) -> AloneError | None:
    """What to tell of an error that comes of another process's end; None of any other, and of a single process's."""
    if jax.process_count() == 1 or not GONE.search(str(error)):
        return None
    reason = " ".join(str(error).split())[:200]
    return AloneError(
        f"another process is gone, or its network ({reason}): the same command in all processes goes on from the last "
        "checkpoint"
    )


def check_devices() -> None:
    """Raises a `UserError` where JAX finds no device of the kind that it was told to use."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the first is what it says of a plugin that isn't installed
        kind = os.environ.get("JAX_PLATFORMS") or "(not set)"
        reason = " ".join(str(error).split())[:200] or "it is not installed"
        raise UserError(
            f"JAX_PLATFORMS={kind}: JAX finds no such device ({reason}): install its part, such as pip install -e "
            "'.[cuda]', or unset the variable"
        ) from error


def reserve_memory() -> None:
    """Has the GPUs of this process reserve their memory now, in a thread of its own, instead of at the first array.

    That takes more than a second (1.4 s of a start on an H200), in which the host reads its text and its programs.
    """

    def put() -> None:
        with contextlib.suppress(RuntimeError):  # no memory is free: the run meets that too, and says which setting
            jax.device_put([np.zeros((), np.float32)] * len(devices), devices)

    if jax.default_backend() == "gpu":
        devices = jax.local_devices()
        threading.Thread(target=put, name="reserve-memory").start()


def detected(environment: Mapping[str, str]) -> str | None:
    """The launcher that started several processes: slurm, ompi (Open MPI), tpu (Cloud TPU), k8s; else None."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi"
    if all(name in environment for name in slurm) and int(environment["SLURM_NTASKS"]) > 1:
        return "slurm"
    if _has_tpu() and "TPU_SKIP_MDS_QUERY" not in environment:  # which a notebook service sets on its single host
        return "tpu"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:  # an indexed job
        return "k8s"
    return None


def _has_tpu() -> bool:
    return bool(importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def first_process() -> bool:
    """Whether this is the process that writes logs, pictures and manifests."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """What each process says, in their order; every process calls it as often as the others."""
    if jax.process_count() == 1:
        return [text]
    client, turn = runtime.global_state.client, next(_turn)
    assert client is not None
    client.key_value_set(f"convattn/{turn}/{jax.process_index()}", text)
    return [client.blocking_key_value_get(f"convattn/{turn}/{i}", PATIENCE) for i in range(jax.process_count())]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that fails on every process if it fails on one: the others raise a `UserError` that says where and why.

    It ends on no process before it has ended on all.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    if jax.process_count() > 1:
        text = "" if mine is None else str(mine) if isinstance(mine, UserError) else f"{type(mine).__name__}: {mine}"
        said = gather(json.dumps([_name(), " ".join(text.split())]))
        for name, problem in map(json.loads, said):
            if problem:
                raise UserError(f"{name}: {problem}") from mine
    if mine is not None:
        raise mine


def from_first(make: Callable[[], T]) -> T:
    """`make()` of the first process, JSON-ready, on every process; its failure is everyone's."""
    value = None
    with together():
        if first_process():
            value = make()
    return json.loads(gather(json.dumps(value))[0]) if jax.process_count() > 1 else value  # pyright: ignore


def check_same(facts: Mapping[str, object]) -> None:
    """Raises, on every process, a `UserError` that names the first host and fact that differ from the first host's."""
    if jax.process_count() == 1:
        return
    said = [json.loads(text) for text in gather(json.dumps([_name(), {k: repr(v) for k, v in facts.items()}]))]
    (first, expected), *others = said
    for name, found in others:
        for fact in sorted(expected.keys() | found.keys()):
            there, here = found.get(fact, "nothing"), expected.get(fact, "nothing")
            check(there == here, f"{name} has {fact}={there}, {first} has {here}: all hosts need the same")


def check_shared(folder: epath.Path) -> None:
    """Raises, on every process, a `UserError` unless all of them see the same folder."""
    if jax.process_count() == 1:
        return
    probe = folder / f".shared-{from_first(lambda: uuid.uuid4().hex)}"
    with together():
        if first_process():
            probe.write_text("")
    try:
        with together():
            list(folder.iterdir())  # a network file system looks again
            check(probe.exists(), f"--workdir={folder} is another folder than {_name(0)}'s: name one that all share")
    except UserError:
        if first_process():
            probe.unlink()
        with contextlib.suppress(OSError):  # it holds something
            os.rmdir(folder)
        raise
    if first_process():
        probe.unlink()


@functools.cache
def code() -> dict[str, str]:
    """{file of this package: its digest, library: its version}."""
    root = pathlib.Path(__file__).parent
    files = sorted(path for path in root.rglob("*.py") if path.is_file())  # an editor may leave links to nowhere
    digests = {str(p.relative_to(root.parent)): hashlib.sha256(p.read_bytes()).hexdigest()[:8] for p in files}
    return {**digests, **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def configuration(flat: Mapping[str, object]) -> dict[str, object]:
    """The facts of a flat configuration that must be the same on all hosts."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in flat.items() if key not in OWN}


def _name(process: int | None = None) -> str:
    """host 2 (worker-2)"""
    return f"host {jax.process_index()} ({socket.gethostname()})" if process is None else f"host {process}"
