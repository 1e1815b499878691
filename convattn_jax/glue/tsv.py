"""GLUE's rows out of a folder of the original TSV files, whole or in part."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from convattn_jax.config import UserError, check
from convattn_jax.glue.split import Split, make_split, split_names
from convattn_jax.glue.tasks import Task

MSR_TRAIN, MSR_TEST, MSR_DEV_IDS = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "mrpc_dev_ids.tsv"
BOM = b"\xef\xbb\xbf"
_COLA_HEADER = ("source", "label", "mark", "sentence")  # CoLA's labelled files have none
_BROKEN_AT_MOST = 100  # lines; QQP's training file has some twenty

_log = logging.getLogger(__name__)


def load_tsv(folder: str | epath.PathLike, task: Task) -> dict[str, Split]:
    """The splits of a task whose files are in FOLDER/<task's folder>; a NAME_subset.tsv stands in for a NAME.tsv.

    Splits for evaluation and prediction that are not there are left out; so AX may be missing altogether.

    Raises:
      UserError: no folder or training file; a file that is empty, cut off or damaged, with the line.
    """
    home = check_there(folder, task)
    if home is None:
        return {}
    if has_msr_files(home, task):
        return _load_msr(home, task)
    paths = {name: _find(home, task, name) for name in split_names(task)}
    return {name: _read(path, task, name) for name, path in paths.items() if path is not None}


def check_there(folder: str | epath.PathLike, task: Task) -> epath.Path | None:
    """The folder of a task's files, with its training file in it; None where there is none and none is needed."""
    home = find_home(folder, task)
    if home is not None and "train" in split_names(task) and not has_msr_files(home, task):
        needed = f"{home / 'train.tsv'} is missing; {task.name} needs it, get GLUE's files anew"
        check(_find(home, task, "train") is not None, f"glue.data_dir={folder}: {needed}")
    return home


def _find(home: epath.Path, task: Task, split: str) -> epath.Path | None:
    stem = "diagnostic" if task.name == "ax" else split.replace("validation", "dev")
    return next((path for name in (stem, f"{stem}_subset") if (path := home / f"{name}.tsv").exists()), None)


def find_home(folder: str | epath.PathLike, task: Task) -> epath.Path | None:
    """The folder of a task's files, None where there is none and the task has no training."""
    root = epath.Path(folder).expanduser()
    check(root.is_dir(), f"glue.data_dir={folder}: is no folder; name the one that holds GLUE's, such as CoLA and RTE")
    names = (task.folder, "diagnostic") if task.name == "ax" else (task.folder,)
    home = next((root / name for name in names if (root / name).is_dir()), None)
    if home is None and task.train_rows:
        raise UserError(f"glue.data_dir={folder}: has no folder {task.folder}; put {task.name}'s files there")
    return home


def _read(path: epath.Path, task: Task, split: str) -> Split:
    """One file as a split; the labels of tests are hidden."""
    headless = task.name == "cola" and split != "test"
    header, rows = _table(path, task.broken_rows, _COLA_HEADER if headless else None)
    places = [_column(path, header, name) for name in task.columns]
    label = None if split in task.tests else _column(path, header, task.label)
    texts, labels, idx = [], [], []
    for number, line, fields in rows:
        texts.append(tuple(fields[place] for place in places))
        labels.append(-1 if label is None else _to_label(fields[label], task, f"{path}, line {line}"))
        idx.append(number)
    check(bool(texts), f"{path}: has no rows; get the file anew")
    return make_split(task, texts, labels, idx)


def _table(
    path: epath.Path, broken_rows: bool, header: Sequence[str] | None
) -> tuple[Sequence[str], Iterator[tuple[int, int, list[str]]]]:
    """The header, taken from the file if none is given, and (row number, line number, fields) of each row.

    Quotes are text like any other. With `broken_rows` lines with too few fields, other than the last, are left out but
    keep their number.
    """
    lines = read_lines(path)
    if header is None:
        first = next(lines, None)
        if first is None:
            raise UserError(f"{path}: is empty; get the file anew")
        header = first[1]
    width = len(header)

    def rows() -> Iterator[tuple[int, int, list[str]]]:
        broken: list[int] = []
        fields: list[str] = []
        for number, (line, fields) in enumerate(lines):
            if len(fields) == width:
                yield number, line, fields
                continue
            broken.append(line)
            if not broken_rows or len(fields) > width or len(broken) > _BROKEN_AT_MOST:
                raise _bad_width(path, line, fields, width)
        if broken and len(fields) != width:
            raise _bad_width(path, broken[-1], fields, width)
        if broken:
            _log.warning("%s: %d lines with too few columns are left out", path, len(broken))

    return header, rows()


def _bad_width(path: epath.Path, line: int, fields: Sequence[str], width: int) -> UserError:
    return UserError(
        f"{path}, line {line}: {len(fields)} columns instead of {width}; the file is cut off or damaged, get it anew"
    )


def read_lines(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, fields) of the lines that are not empty."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                raw = raw.removeprefix(BOM) if number == 1 else raw
                text = raw.rstrip(b"\r\n").decode()
                if text:
                    yield number, text.split("\t")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: is not UTF-8; the file is damaged, get it anew") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); get the file anew") from error


def _column(path: epath.Path, header: Sequence[str], name: str) -> int:
    check(name in header, f"{path}, line 1: has no column {name!r}, only {', '.join(header)}; get the file anew")
    return header.index(name)


def _to_label(text: str, task: Task, where: str) -> float | int:
    if task.is_regression:
        with contextlib.suppress(ValueError):
            if 0.0 <= float(text) <= 5.0:
                return float(text)
        raise UserError(f"{where}: the score {text!r} is none from 0 to 5; the file is damaged, get it anew")
    known = tuple(map(str, range(len(task.labels)))) if task.numbered else task.labels
    check(text in known, f"{where}: the label {text!r} is none of {', '.join(known)}; the file is damaged, get it anew")
    return known.index(text)


# --- MRPC as Microsoft published it: its training file holds the dev rows, which a list of id pairs tells apart ---


def has_msr_files(home: epath.Path, task: Task) -> bool:
    """Whether these are Microsoft's files and not train.tsv and dev.tsv."""
    return task.name == "mrpc" and (home / MSR_TRAIN).exists() and not (home / "train.tsv").exists()


def msr_paths(home: epath.Path) -> dict[str, epath.Path]:
    """{"train", "test", "dev_ids"} -> path, all of them there."""
    ids = [home / MSR_DEV_IDS, home / "dev_ids.tsv"]
    paths = {"train": home / MSR_TRAIN, "test": home / MSR_TEST, "dev_ids": ids[ids[1].exists()]}
    for path in paths.values():
        check(path.exists(), f"{path} is missing: put it beside {MSR_TRAIN}, or make train.tsv and dev.tsv of both")
    return paths


def _load_msr(home: epath.Path, task: Task) -> dict[str, Split]:
    paths = msr_paths(home)
    held = {tuple(fields[:2]) for _, fields in read_lines(paths["dev_ids"])}
    header, rows = _table(paths["train"], False, None)
    ids = [_column(paths["train"], header, name) for name in ("#1 ID", "#2 ID")]
    in_dev = np.array([tuple(fields[place] for place in ids) in held for _, _, fields in rows], bool)
    both = _read(paths["train"], task, "train")
    splits = {"train": _taken(both, ~in_dev), "validation": _taken(both, in_dev)}
    for name, split in splits.items():
        check(len(split) > 0, f"{paths['dev_ids']}: leaves no rows for {name}; get the file anew")
    return splits | {"test": _read(paths["test"], task, "test")}


def _taken(split: Split, which: np.ndarray) -> Split:
    places = np.flatnonzero(which)
    return Split([split.texts[i] for i in places], split.labels[places], split.idx[places])
