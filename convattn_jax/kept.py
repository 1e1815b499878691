"""Traced programs, kept beside JAX's compiled ones: a run that starts again does not trace its model.

JAX's cache spares XLA's work, but finds a program by its text, and so traces and lowers it first. Here the text itself
is kept, as `jax.export` writes it, and found by all that it is a function of (`determinants`): a `Kept` makes its maker
from exactly the arguments that it tells of, and programs come from the maker alone, so that nothing a program holds can
be missing from its name. What is read is data, a StableHLO module and JSON: it runs nothing by itself.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax import export
from jax.sharding import Mesh

from convattn_jax import determinants
from convattn_jax.data.corpus import write_atomically

log = logging.getLogger(__name__)

T = TypeVar("T")

PLATFORMS = ("cpu", "gpu")  # where it was tried
FOLDER = "traced"  # of the folder of compiled programs, with which it is pruned
SEAL = 32  # bytes
# calls that JAX would keep back, since they may mean something else in its next version: which is part of the name
BY_VERSION = tuple(map(export.DisabledSafetyCheck.custom_call, ("__gpu$xla.gpu.triton",)))


class _Place(NamedTuple):
    folder: pathlib.Path
    facts: tuple[str, ...]  # that are in no argument


_place: _Place | None = None
_readers = concurrent.futures.ThreadPoolExecutor(1, "read-program")


def use(folder: pathlib.Path | None, config_file: str = "", size: str = "") -> None:
    """Has programs made from now on looked up, and kept, in a part of `folder`; None: nowhere.

    `config_file` is the Python file that made the configuration, of this `size`: it may have changed what code means.
    """
    global _place
    _place = None
    if folder is not None:
        inside = folder / FOLDER
        try:
            inside.mkdir(exist_ok=True)
            text = pathlib.Path(config_file).read_bytes() if config_file else b""
            _place = _Place(inside, (hashlib.sha256(text).hexdigest(), size))
        except OSError as error:
            log.warning("traced programs are not kept: %s: %s", inside, error.strerror)


@dataclasses.dataclass(frozen=True)
class Traceable:
    """A function of trees of tuples, lists and dicts, and how it is compiled."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # their shapes, with shardings where these matter
    out_shardings: Any = None
    returns: Any = None  # shapes of what it returns, with shardings, where they are known
    donate: tuple[int, ...] = ()
    options: dict[str, str | bool] | None = None  # the compiler's
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # when it is lowered

    def lower(self) -> jax.stages.Lowered:
        """What can be compiled."""
        with self.within():
            return self._jitted().lower(*self.arguments)

    def export(self) -> export.Exported:
        """What can be kept."""
        with self.within():
            return export.export(self._jitted(), disabled_checks=BY_VERSION)(*self.arguments)

    def _jitted(self) -> Any:
        return jax.jit(
            self.function,
            donate_argnums=self.donate,
            in_shardings=jax.tree.map(lambda shape: shape.sharding, self.arguments),
            out_shardings=self.out_shardings,
            compiler_options=self.options,
        )


class Kept(Generic[T]):
    """`made`, which is `make(*arguments)`, and its programs for `mesh`, by name.

    Several processes, devices of other kinds than `PLATFORMS`, and code that may not be what its files hold, keep
    nothing: each program is traced.
    """

    def __init__(self, make: Callable[..., T], *arguments: Any, mesh: Mesh):
        self.made = make(*arguments)
        self._mesh = mesh
        self._traced: dict[str, Traceable] = {}
        self._compiled: dict[str, jax.stages.Compiled] = {}
        self._compiling: dict[str, concurrent.futures.Future[jax.stages.Compiled]] = {}
        self._path: pathlib.Path | None = None
        if _place and jax.process_count() == 1 and jax.default_backend() in PLATFORMS:
            self._path = self._found_out(_place, f"{make.__module__}.{make.__qualname__}", arguments)

    def _found_out(self, place: _Place, maker: str, arguments: tuple[Any, ...]) -> pathlib.Path | None:
        try:
            self._files = determinants.files()
            doubt = determinants.doubt(self._files)
        except OSError as error:  # a file went away in this very moment
            doubt = _line(error)
        if doubt:
            log.info("traced programs are not kept: %s", doubt)
            return None
        return place.folder / determinants.digest((maker, arguments), self._files, *place.facts)

    def ahead(self, name: str) -> None:
        """Begins to compile, in another thread, a program that will be wanted and is kept."""
        if found := self._read(name):
            self._compiling[name] = _readers.submit(lambda: found.lower().compile())

    def program(self, name: str, of: Callable[[T], Traceable]) -> jax.stages.Compiled:
        """`of(made)`, compiled; `of` is a function of what it is given alone."""
        if name not in self._compiled:
            ahead = self._compiling.pop(name, None)
            self._compiled[name] = ahead.result() if ahead else self._traceable(name, of).lower().compile()
        return self._compiled[name]

    def returns(self, name: str, of: Callable[[T], Traceable]) -> Any:
        """Shapes of what the program returns, with shardings; None where neither it is kept nor `of(made)` knows."""
        return self._traceable(name, of).returns

    def _traceable(self, name: str, of: Callable[[T], Traceable]) -> Traceable:
        """One that is traced already, read or just written, where programs are kept: JAX finds it by the same text."""
        found = self._read(name)
        if found is None:
            found = self._traced[name] = self._write(name, of(self.made))
        return found

    def _file(self, name: str) -> pathlib.Path | None:
        return self._path and self._path.with_name(f"{self._path.name}-{name}")

    def _read(self, name: str) -> Traceable | None:
        """What was kept by this name; None, and a line in the log, where that can't be had."""
        path = self._file(name)
        if name in self._traced or path is None or not path.exists():
            return self._traced.get(name)
        try:
            content = path.read_bytes()
            if content[:SEAL] != _seal(path, content[SEAL:]):
                raise ValueError("it is damaged")
            said, found = self._decoded(content[SEAL:])
        except Exception as error:  # whatever keeps it from being read, it can be traced
            log.warning("a kept program cannot be read (%s: %s): tracing it anew", path, _line(error))
            return None
        for logger, level, message in said:
            logging.getLogger(logger).log(level, "%s", message)
        self._traced[name] = found
        return found

    def _write(self, name: str, traceable: Traceable) -> Traceable:
        path = self._file(name)
        if path is None:
            return traceable
        try:
            with _said() as said:
                exported = traceable.export()
            if new := determinants.files().keys() - self._files.keys():
                raise ValueError(f"it loaded {min(new)}, which is not in its name")
            facts = {"said": said, "donate": traceable.donate, "options": traceable.options}
            data = json.dumps(facts).encode() + b"\n" + exported.serialize()
            write_atomically(path, _seal(path, data) + data)
            return self._decoded(data)[1]
        except Exception as error:  # what calls back to Python can't be written; nor need a disk have room
            log.warning("a program is not kept (%s: %s)", name, _line(error))
            return traceable

    def _decoded(self, data: bytes) -> tuple[list[tuple[str, int, str]], Traceable]:
        facts, _, module = data.partition(b"\n")
        facts, exported = json.loads(facts), export.deserialize(bytearray(module))
        ins, outs = exported.in_shardings_jax(self._mesh), exported.out_shardings_jax(self._mesh)
        arguments, _ = jax.tree.unflatten(exported.in_tree, list(map(_placed, exported.in_avals, ins)))
        found = Traceable(
            exported.call,
            arguments,
            jax.tree.unflatten(exported.out_tree, outs),
            jax.tree.unflatten(exported.out_tree, list(map(_placed, exported.out_avals, outs))),
            tuple(facts["donate"]),
            facts["options"],
        )
        return [(logger, level, message) for logger, level, message in facts["said"]], found


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _seal(path: pathlib.Path, data: bytes) -> bytes:
    """A digest of a file and of its name, under which alone it is what it says."""
    return hashlib.sha256(path.name.encode() + data).digest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


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
