"""GLUE's rows out of TensorFlow Datasets' array_record files, without TensorFlow; TFDS is imported on use only."""

import contextlib
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from convattn_jax.config import UserError, check
from convattn_jax.glue import tsv
from convattn_jax.glue.split import Split, make_split, split_names
from convattn_jax.glue.tasks import Task

_BATCH = 512  # examples read at a time: one by one is much slower


def load_tfds(data_dir: str, task: Task) -> dict[str, Split]:
    """The splits of TFDS's glue/<task> in `data_dir` (TFDS's own folder if ''), prepared there first where it is not.

    It is prepared from the original files, all of the task's, if `data_dir` holds them, else from the network.

    Raises:
      UserError: it cannot be prepared, or lies there in a format that cannot be read without TensorFlow or loss.
    """
    builder = _builder(task, data_dir)
    if not builder.is_prepared():
        holds_files = data_dir and (epath.Path(data_dir).expanduser() / task.folder).is_dir()
        home = tsv.find_home(data_dir, task) if holds_files else None
        if home is None:
            _prepare(builder)
        else:
            tsv.load_tsv(data_dir, task)  # names what is wrong with a file before TFDS stumbles over it
            _prepare_from_originals(builder, home, task)
    return _read_prepared(builder, task)


def _prepare_from_originals(builder: Any, home: epath.Path, task: Task) -> None:
    with tempfile.TemporaryDirectory(prefix="convattn-mrpc-") as temporary:
        files = _originals(home, task, epath.Path(temporary))
        builder._make_download_manager = functools.partial(_Originals, files)
        _prepare(builder)


class _Originals:
    """As much of a TFDS download manager as its GLUE builders use: each download is a path that is there already."""

    downloaded_size = 0

    def __init__(self, files: Any, **_: Any):
        self._files = files

    def download(self, _: Any) -> Any:
        """The path of AX's file, the paths of MRPC's."""
        return self._files

    def download_and_extract(self, _: Any) -> Any:
        """The folder in which the task's folder lies."""
        return self._files


def _originals(home: epath.Path, task: Task, temporary: epath.Path) -> Any:
    """What the builder's downloads are to give."""
    if tsv.has_msr_files(home, task):
        return {name: str(path) for name, path in tsv.msr_paths(home).items()}
    names = ["diagnostic"] if task.name == "ax" else [name.replace("validation", "dev") for name in split_names(task)]
    for name in names:
        path = home / f"{name}.tsv"
        check(path.exists(), f"{path} is missing: TFDS takes whole tasks only; read the folder with glue.source=tsv")
    if task.name == "ax":
        return str(home / "diagnostic.tsv")
    return _as_msr_files(home, temporary) if task.name == "mrpc" else str(home.parent)


def _as_msr_files(home: epath.Path, temporary: epath.Path) -> dict[str, str]:
    """MRPC's train.tsv and dev.tsv joined again as Microsoft published them."""
    (_, header), *train = tsv.read_lines(home / "train.tsv")
    dev = [fields for _, fields in tsv.read_lines(home / "dev.tsv")][1:]
    rows = [header, *(fields for _, fields in train), *dev]
    paths = {"train": temporary / tsv.MSR_TRAIN, "test": home / "test.tsv", "dev_ids": temporary / tsv.MSR_DEV_IDS}
    paths["train"].write_bytes(tsv.BOM + "".join("\t".join(fields) + "\n" for fields in rows).encode())
    paths["dev_ids"].write_text("".join("\t".join(fields[1:3]) + "\n" for fields in dev))
    return {name: str(path) for name, path in paths.items()}


def _builder(task: Task, data_dir: str) -> Any:
    try:
        import tensorflow_datasets as tfds
        import tensorflow_datasets.text  # registers glue
    except ImportError as error:
        raise UserError(
            f"glue.source=tfds needs tensorflow-datasets: pip install tensorflow-datasets ({error})"
        ) from error
    where: dict[str, Any] = {"data_dir": str(epath.Path(data_dir).expanduser())} if data_dir else {}
    name = f"glue/{task.name}"
    try:
        with _quiet():
            builder = tfds.builder(name, **where)
            return builder if builder.is_prepared() else tfds.builder(name, file_format="array_record", **where)
    except Exception as error:
        raise UserError(f"glue.data_dir={data_dir}: {name} cannot be opened ({_line(error)})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's warnings that what is not prepared yet is not there."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _prepare(builder: Any) -> None:
    try:
        with _quiet():
            builder.download_and_prepare()
    except Exception as error:  # downloads and generators raise anything
        raise UserError(
            f"glue.data_dir: {builder.info.full_name} is not in {builder.data_dir} and cannot be prepared "
            f"({_line(error)}): prepare it where that works (tfds build --file_format=array_record), or use GLUE's TSVs"
        ) from error


def _read_prepared(builder: Any, task: Task) -> dict[str, Split]:
    kept_as = builder.info.file_format.value if builder.info.file_format else "nothing"
    check(
        kept_as == "array_record",
        f"glue.data_dir: {builder.data_dir} holds {kept_as}, which cannot be read here without loss: prepare it as "
        "array_record (tfds build --file_format=array_record) in another glue.data_dir",
    )
    there = builder.info.splits
    for name in split_names(task):
        check(
            name in there and there[name].num_examples > 0,
            f"glue.data_dir: {builder.data_dir} has no rows of {name}; prepare it anew in another glue.data_dir",
        )
    return {name: _read_split(builder, task, name) for name in split_names(task)}


def _read_split(builder: Any, task: Task, name: str) -> Split:
    to_ours = _label_map(builder, task)
    try:
        source = builder.as_data_source(name)
    except ImportError as error:
        raise UserError(f"glue.source=tfds needs array_record: pip install array_record ({error})") from error
    rows = []
    for start in range(0, len(source), _BATCH):
        for row in source.__getitems__(range(start, min(start + _BATCH, len(source)))):
            texts = tuple(row[field].decode() for field in task.texts)
            rows.append((int(row["idx"]), texts, -1 if name in task.tests else to_ours(row["label"])))
    rows.sort(key=lambda row: row[0])  # TFDS shuffles
    idx, texts, labels = zip(*rows, strict=True)
    return make_split(task, list(texts), labels, idx)


def _label_map(builder: Any, task: Task) -> Callable[[Any], float | int]:
    """From TFDS's labels to ours, by the names of the classes, whose order differs for MNLI."""
    if task.is_regression:
        return float
    numbers = [task.labels.index(name) for name in builder.info.features["label"].names]
    return lambda label: numbers[label]


def _line(error: Exception) -> str:
    """The first line of an error, not too long."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
