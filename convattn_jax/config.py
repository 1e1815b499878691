"""The door: flags -> configuration -> frozen dataclasses, once; below it there are only dataclasses and arrays.

A configuration file is Python with a `get_config`; `--config=FILE[:SIZE]` names it and `--config.KEY=VALUE` overrides
a value. Whatever is wrong with what a user typed is a `UserError`: one line with the field and the remedy.
"""

import collections
import contextlib
import dataclasses
import difflib
import inspect
import pathlib
import signal
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

T = TypeVar("T")
OPTIONS = ("workdir", "compile_cache", "coordinator", "processes", "process")  # beside --config and its keys
BY_KEYBOARD = 128 + signal.SIGINT  # the exit status after Ctrl-C, as shells count
_KINDS = {int: "a whole number", float: "a number", bool: "True or False"}
Keys = Mapping[str, Any] | ml_collections.ConfigDict


class UserError(Exception):
    """Something the user can put right; its text is one line that names the field and the remedy."""


class AloneError(UserError):
    """The other processes of a run are gone: what waits for them at the end of this one would wait in vain."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and did, with nothing lost; its text says how to go on.

    `status` is what the process ends with: 0 where a cluster asked for it (SIGTERM); `BY_KEYBOARD`, so that a shell
    does not go on to what was to follow.
    """

    def __init__(self, text: str, status: int = 0):
        super().__init__(text)
        self.status = status


def check(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_choice(field: str, value: str, known: Iterable[str]) -> None:
    """Raises a `UserError` that lists the known names unless `value` is one of them."""
    known = tuple(known)
    if value not in known:
        raise UserError(f"{field}={value!r} is unknown{did_you_mean(value, known)}; known: {', '.join(known)}")


def from_config(cls: type[T], values: Keys, where: str = "") -> T:
    """Builds a (nested) frozen dataclass from a mapping, strictly: every key, no other key, the annotated types.

    Raises:
      UserError: a key is missing or unknown, or a value has another type than its field.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for key in values:
        check(key in names, f"{where}{key} is unknown{did_you_mean(key, names)}; known: {', '.join(names)}")
    missing = [name for name in names if name not in values]
    check(not missing, f"{where}{', '.join(missing)} missing: the configuration must set it (see configs/base.py)")
    return cls(**{name: _convert(hints[name], values[name], where + name) for name in names})


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, Mapping | ml_collections.ConfigDict), f"{where} must be a group of keys")
        return from_config(typing.cast(type, kind), value, where + ".")
    if typing.get_origin(kind) is tuple:
        check(isinstance(value, tuple | list), f"{where}={value!r} must be a tuple, such as a,b")
        return tuple(_convert(typing.get_args(kind)[0], item, where) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r} must be of type {kind.__name__}")
    return value


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5, shown: Mapping[str, str] | None = None) -> str:
    """' (did you mean ...?)' with the known word, or what is `shown` for it, that resembles one; '' where none does."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {(shown or {}).get(close[0], close[0])!r}?)" if close else ""


# --- flags ---


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This process among those that make up a run; all empty where it is alone or its launcher knows."""

    coordinator: str = ""  # host:port of process 0
    processes: int | None = None
    process: int | None = None

    def __post_init__(self):
        given = (bool(self.coordinator), self.processes is not None, self.process is not None)
        check(len(set(given)) == 1, "--coordinator, --processes and --process go together: give all three, or none")
        if self.coordinator and self.processes is not None and self.process is not None:
            port = self.coordinator.rpartition(":")[2]
            is_port = port.isdecimal() and 0 < int(port) < 2**16
            check(is_port, f"--coordinator={self.coordinator} must be host:port, with a port from 1 to 65535")
            check(
                0 <= self.process < self.processes,
                f"--process={self.process} must lie in [0, {self.processes}), the number of --processes",
            )


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    config: ml_collections.ConfigDict
    workdir: str
    cluster: Cluster = Cluster()
    compile_cache: str | None = None  # None: where it is by default
    given: frozenset[str] = frozenset()  # the keys whose values are not those of the file
    file: str = ""  # of the configuration
    size: str = ""  # that the file was asked for


def parse(argv: list[str], default_root: str = "runs") -> Command:
    """Reads `--config=FILE[:SIZE]`, `--config.KEY=VALUE`, `--workdir`, `--compile_cache` and what `Cluster` holds.

    Raises:
      UserError: no or an unreadable configuration, an unknown flag or key, a value of another type.
    """
    spec, overrides = _split(argv[1:])
    config = load_config_file(spec)
    before = flatten(config)
    known = {f"config.{key}": value for key, value in before.items()}
    argv = [argv[0], *(_checked(arg, known) for arg in _joined(overrides, known))]

    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "the run folder", flag_values=values)
    flags.DEFINE_string("compile_cache", None, "the folder of compiled programs", flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many processes make up the run", flag_values=values)
    flags.DEFINE_integer("process", None, "which of them this is", flag_values=values)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    check(len(rest) == 1, f"unexpected argument {rest[1:2]}: options are written --name=value")
    config = typing.cast(ml_collections.ConfigDict, values["config"].value)
    default = f"{default_root}/{config.name}" if config.name else ""  # a task without a name says where itself
    cluster = Cluster(*(typing.cast(Any, values[name].value) for name in ("coordinator", "processes", "process")))
    compile_cache = typing.cast(str | None, values["compile_cache"].value)
    given = frozenset(key for key, value in flatten(config).items() if value != before.get(key))
    workdir, (file, _, size) = str(values["workdir"].value or "") or default, spec.partition(":")
    return Command(config, workdir, cluster, compile_cache, given, file, size)


def load_config_file(spec: str) -> ml_collections.ConfigDict:
    """Runs `get_config` of FILE[:ARGUMENT], with errors that say what to do."""
    return run_file("config", spec, ml_collections.ConfigDict)


def run_file(option: str, spec: str, kind: type[T]) -> T:
    """What `get_<option>` of FILE[:ARGUMENT] returns, a value of `kind`, with errors that say what to do."""
    path_text, _, argument = spec.partition(":")
    path = pathlib.Path(path_text)
    if not path.is_file():
        near = {file.stem: str(file) for file in _files(option)}
        hint = did_you_mean(path.stem, near, 0.7, near)
        raise UserError(f"--{option}={path_text}: no such file{hint}{_files_there_are(option)}")
    module = types.ModuleType("_convattn_config")
    module.__file__ = str(path)
    name = f"get_{option}"
    try:
        # run rather than imported: an import would leave a __pycache__ beside the user's file
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
        others = [word for word in ("config", "sweep") if word != option and hasattr(module, f"get_{word}")]
        instead = f": it is one for --{others[0]}" if others else ""
        check(hasattr(module, name), f"--{option}={spec}: the file has no {name}(){instead}")
        make = getattr(module, name)
        takes_size = bool(inspect.signature(make).parameters)
        check(takes_size or not argument, f"--{option}={spec}: this file takes no size")
        made = make(argument) if argument else make()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--{option}={spec} cannot be loaded ({reason}): mend the file") from error
    check(isinstance(made, kind), f"--{option}={spec}: {name} must return a {kind.__name__}")
    return made


def flatten(config: Keys, prefix: str = "") -> dict[str, Any]:
    """{'model.radius': 8, ...} of a nested configuration."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def to_plain(value: Any) -> Any:
    """The JSON-ready form of a dataclass: nested dicts, lists, numbers, strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _split(args: list[str]) -> tuple[str, list[str]]:
    """Takes `--config=FILE` (or `--config FILE`) out of the arguments."""
    for i, arg in enumerate(args):
        name, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            taken = 1 if equals else 2
            value = value or "".join(args[i + 1 : i + taken])
            if value:
                return value, args[:i] + args[i + taken :]
    for name in (arg[2:].partition("=")[0] for arg in args if arg.startswith("--")):
        hint = "" if name in OPTIONS else did_you_mean(name, ("config",))
        check(not hint or name == "config", f"--{name} is no option{hint}")
    raise UserError(f"--config=FILE is missing{_files_there_are('config')}")


def _files_there_are(option: str) -> str:
    files = _files(option)
    return f"; there are: {', '.join(map(str, files))}" if files else ""


def _files(option: str) -> list[pathlib.Path]:
    """The configurations, or sweeps, here or else of this code."""
    roots = (pathlib.Path("configs"), pathlib.Path(__file__).resolve().parent.parent / "configs")
    for root in (root / "sweeps" if option == "sweep" else root for root in roots):
        files = sorted(p for p in root.glob("*.py") if p.stem not in ("__init__", "base"))
        if files:
            return files
    return []


def _joined(args: list[str], known: Mapping[str, Any]) -> Iterator[str]:
    """`--name value` as `--name=value`, for whatever is no switch."""
    rest = collections.deque(args)
    while rest:
        arg = rest.popleft()
        apart = arg.startswith("--") and "=" not in arg and not isinstance(known.get(arg[2:]), bool)
        yield f"{arg}={rest.popleft()}" if apart and rest and not rest[0].startswith("--") else arg


def _checked(arg: str, known: Mapping[str, Any]) -> str:
    """Passes `arg` on, a list such as `a,b` as the tuple it means; a name that is not there becomes an error."""
    name, equals, value = arg.lstrip("-").partition("=")
    if arg.startswith("-") and name.startswith("config.") and name not in known:
        raise UserError(f"--{name} is no key of the configuration{_meant(name, known)}")
    check(name != "config" or not arg.startswith("-"), "--config stands there twice: give one")
    if arg.startswith("-") and not name.startswith("config.") and name not in OPTIONS:
        hint = did_you_mean(name, ("config", *OPTIONS)) or _meant(f"config.{name}", known)
        raise UserError(f"--{name} is no option{hint}")
    if name in known:
        _check_value(name, value if equals else None, known[name])
    if equals and isinstance(known.get(name), tuple) and not value.startswith("("):
        return f"--{name}={tuple(part for part in value.split(',') if part)!r}"
    return arg


def _check_value(name: str, value: str | None, default: Any) -> None:
    """Raises a `UserError` where the text is no number or truth value and the key's default is one."""
    kind = type(default)
    if kind not in _KINDS or (value is None and kind is bool):
        return
    example = "True or False" if kind is bool else default
    with contextlib.suppress(ValueError, OverflowError):
        if kind is int and float(value or "").is_integer():
            example = int(float(value or ""))
    check(bool(value), f"--{name} has no value: write --{name}={example}")
    remedy = "write one of them" if kind is bool else f"write --{name}={example}"
    check(_reads(kind, value or ""), f"--{name}={value} must be {_KINDS[kind]}: {remedy}")


def _reads(kind: type, value: str) -> bool:
    if kind is bool:
        return value.lower() in ("true", "t", "1", "false", "f", "0")
    try:
        int(value, 16 if value.lower().startswith(("0x", "-0x")) else 10) if kind is int else float(value)
    except ValueError:
        return False
    return True


def _meant(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    groups = {key.rsplit(".", 1)[0] for key in known}
    if name in groups:
        return f": it is a group, with {', '.join(k for k in known if k.startswith(name + '.'))}"
    last = name.rsplit(".", 1)[-1]
    same_leaf = [key for key in known if key.rsplit(".", 1)[-1] == last]
    shorter = {key.removeprefix("config."): key for key in same_leaf or known}  # what all share makes none alike
    close = difflib.get_close_matches(name.removeprefix("config."), shorter, n=1, cutoff=0.0 if same_leaf else 0.6)
    return f"; did you mean --{shorter[close[0]]}?" if close else ""
