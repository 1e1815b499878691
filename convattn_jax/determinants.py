"""Everything that a traced program is a function of, as one digest: what differs in any of it shares no program.

A program is found by this digest without being traced, so whatever is left out here would be served stale. Arguments
are told in full and of unknown kinds none is let pass; of the rest rather too much is told than too little. Where the
code that runs may not be what the files hold, `doubt` says so, and there is no digest to be had.
"""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
from jax.sharding import Mesh

from convattn_jax import compiled

LIBRARIES = {"jax": jax, "jaxlib": jaxlib, "flax": flax, "optax": optax, "numpy": np}
ENVIRONMENT = ("FLAX_", "XLA_", "JAX_", "TF_", "LIBTPU", "CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "NCCL_", "OMP_")
OF_NO_PROGRAM = ("jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache", "jax_log")


def _process_began() -> float:
    """When this process began, in seconds since 1970; now, where the system doesn't tell."""
    try:
        ticks = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return time.time()


BEGAN = _process_began()  # or the process that this one was forked from, which had loaded the code already


def digest(arguments: Any, code: Mapping[str, str], *facts: str) -> str:
    """Of a program made from `arguments` alone by `code`, in this process as it is now set up.

    Args:
      arguments: what its maker is given.
      code: {file: digest}, as `files` tells it.
      facts: whatever else could have changed what the code means.

    Raises:
      TypeError: an argument is of a kind that `described` doesn't know.
    """
    flax_settings = {name: getattr(flax.config, name) for name in dir(flax.config) if name.startswith("flax_")}
    told = {
        "arguments": described(arguments),
        "code": sorted(code.items()),
        "facts": facts,
        "libraries": _libraries(),
        "settings": {name: v for name, v in jax.config.values.items() if not name.startswith(OF_NO_PROGRAM)},
        "flax": sorted(flax_settings.items()),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ENVIRONMENT)},
        "options": compiled.options(),
        "devices": _devices(jax.devices()),
    }
    return hashlib.sha256(repr(told).encode()).hexdigest()


def doubt(code: Iterable[str]) -> str | None:
    """Why what runs may be other code than these files now hold; None: it is not."""
    if not hasattr(sys.modules["__main__"], "__file__"):
        return "this Python is used interactively, and may have been told something else than its files hold"
    changed = (path for path in code if os.stat(path).st_ctime > BEGAN)
    return next((f"{path} has changed since this process began" for path in changed), None)


def files() -> dict[str, str]:
    """{file: its digest}: this package, and whatever else is loaded that is of no installed library."""
    found = {*pathlib.Path(__file__).parent.rglob("*.py"), *_loaded_elsewhere()}
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found) if path.is_file()}


def described(value: Any) -> Any:
    """A value as nested tuples whose `repr` differs wherever the value does; arrays by their digests.

    Raises:
      TypeError: it is, or holds, something else than numbers, texts, arrays, dataclasses, meshes and their containers.
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return kind, value
    if isinstance(value, np.ndarray) and value.dtype != object:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return kind, value.dtype.str, value.shape, content
    if isinstance(value, tuple | list):
        return kind, tuple(described(item) for item in value)
    if isinstance(value, dict):
        return kind, tuple((described(key), described(item)) for key, item in value.items())
    if isinstance(value, Mesh):
        return kind, value.axis_names, str(value.axis_types), value.devices.shape, _devices(value.devices.flat)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, tuple((field.name, described(getattr(value, field.name))) for field in dataclasses.fields(value))
    raise TypeError(f"a program cannot be kept for a value of type {kind}: it has no description")


def _devices(devices: Iterable[Any]) -> tuple[Any, ...]:
    """Which they are, what they are, and the runtime that speaks to them."""
    return tuple((d.id, d.process_index, d.platform, d.device_kind, d.client.platform_version) for d in devices)


def _loaded_elsewhere() -> set[pathlib.Path]:
    """Files of modules that belong neither to Python nor to a library: they may have added to what models are made of.

    An import hook can give a module a file that isn't there; it is left out.
    """
    paths = sysconfig.get_paths()
    installed = tuple({paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")})
    beside = str(_beside_jaxlib()) + os.sep
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    own = {file for file in files if isinstance(file, str) and not file.startswith((*installed, beside))}
    return set(map(pathlib.Path, own))


def _libraries() -> dict[str, str]:
    """Versions: of what makes programs, as it is loaded, and of all that is installed."""
    versions = {name: module.__version__ for name, module in LIBRARIES.items()}
    folders = {_beside_jaxlib(), *map(pathlib.Path, sys.path)}
    names = {path.name for folder in folders for path in folder.glob("*.dist-info")}
    return {"python": platform.python_version(), **versions, "installed": " ".join(sorted(names))}


def _beside_jaxlib() -> pathlib.Path:
    return pathlib.Path(jaxlib.__file__).parent.parent
