"""Everything that a traced program is a function of, as one digest: what differs in any of it shares no program.

A program is found by this digest without being traced, so whatever is left out here would be served stale. Arguments
are told in full and of unknown kinds none is let pass; of the rest rather too much is told than too little.
"""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sys
import sysconfig
from collections.abc import Iterable
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
from jax.sharding import Mesh

from convattn_jax import compiled

LIBRARIES = {"jax": jax, "jaxlib": jaxlib, "flax": flax, "optax": optax, "numpy": np}
BESIDE_JAXLIB = ("jax", "nvidia", "libtpu", "ml_dtypes")  # distributions: plugins, and the libraries that they load
ENVIRONMENT = ("XLA_", "JAX_", "TF_", "LIBTPU", "CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "NCCL_", "OMP_")
OF_NO_PROGRAM = ("jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache", "jax_log")


def digest(arguments: Any, config_file: str = "") -> str:
    """Of a program made from `arguments` alone by this code, in this process as it is now set up.

    `config_file` was run to make the configuration, and could have changed what the code means.

    Raises:
      TypeError: an argument is of a kind that `described` doesn't know.
    """
    facts = {
        "arguments": described(arguments),
        "code": _code(config_file),
        "libraries": _libraries(),
        "settings": {name: v for name, v in jax.config.values.items() if not name.startswith(OF_NO_PROGRAM)},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ENVIRONMENT)},
        "options": compiled.options(),
        "devices": _devices(jax.devices()),
    }
    return hashlib.sha256(repr(facts).encode()).hexdigest()


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


def _code(config_file: str) -> dict[str, str]:
    """{file: its digest}: this package, and whatever else was loaded that is of no installed library."""
    files = {*pathlib.Path(__file__).parent.rglob("*.py"), *_loaded_elsewhere()}
    if config_file:
        files.add(pathlib.Path(config_file))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def _loaded_elsewhere() -> set[pathlib.Path]:
    """Files of modules that belong neither to Python nor to a library: they may have added to what models are made of.

    An import hook can give a module a file that isn't there; it is left out.
    """
    paths = sysconfig.get_paths()
    installed = tuple({paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")})
    beside = str(_beside_jaxlib()) + os.sep
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    own = {file for file in files if isinstance(file, str) and not file.startswith((*installed, beside))}
    return {path for path in map(pathlib.Path, own) if path.is_file()}


def _libraries() -> dict[str, str]:
    versions = {name: module.__version__ for name, module in LIBRARIES.items()}
    beside = [path.name for path in _beside_jaxlib().glob("*.dist-info") if path.name.startswith(BESIDE_JAXLIB)]
    return {"python": platform.python_version(), **versions, "beside": " ".join(sorted(beside))}


def _beside_jaxlib() -> pathlib.Path:
    return pathlib.Path(jaxlib.__file__).parent.parent
