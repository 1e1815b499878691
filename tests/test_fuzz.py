"""Whatever bytes or words come in: an answer or one line for the user, nothing else; bounded, the same each time."""

import gzip
import json
import lzma
import pathlib
import tempfile

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from configs import base
from convattn_jax import checkpoint, reference_names
from convattn_jax.config import Command, UserError, parse
from convattn_jax.data.corpus import silent
from convattn_jax.data.textfiles import open_files
from convattn_jax.glue.tasks import TASKS
from convattn_jax.glue.tsv import load_tsv
from convattn_jax.run import RunFolder

fuzzed = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
COMPOSITE = str(pathlib.Path(base.__file__).with_name("composite.py"))
TEXT = st.text(max_size=60) | st.text(alphabet="ab\t\n\r \"'\ufeff\x00", max_size=60)
BYTES = st.binary(max_size=200) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def in_one_line(call):
    """The answer, or None where the user was told."""
    try:
        return call()
    except UserError as error:
        told = str(error)
    assert told.strip() == told != ""
    assert "\n" not in told
    return None


@fuzzed
@given(BYTES, st.sampled_from(["rte", "cola", "stsb", "qqp", "ax", "mrpc"]), st.booleans())
def test_tsv_files(content, name, headed):
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder) / task.folder
        home.mkdir()
        header = b"\t".join(part.encode() for part in ("index", *task.columns, task.label)) + b"\n" if headed else b""
        for stem in ("train", "dev", "diagnostic"):
            (home / f"{stem}.tsv").write_bytes(header + content)
        in_one_line(lambda: load_tsv(folder, task))


@fuzzed
@given(BYTES, st.sampled_from([".txt", ".jsonl", ".txt.gz", ".txt.xz", ".txt.zst", ".jsonl.gz"]), st.booleans())
def test_text_files(content, suffix, packed):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"text{suffix}"
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes) if packed else bytes
        path.write_bytes(pack(content))
        corpus = in_one_line(lambda: open_files((str(path),), (), 0.5, folder, silent))
        for split in ("train", "heldout") if corpus else ():
            documents = in_one_line(lambda split=split: list(corpus.read(split)))
            assert all(isinstance(line, str) for document in documents or [] for line in document)


WORDS = st.sampled_from(
    [
        "--config",
        "--config.",
        "model",
        ".radius",
        "=",
        "4",
        "a,b",
        "--workdir",
        "train.steps",
        "('",
        "--",
        "-h",
        " ",
        "[",
    ]
)


@fuzzed
@given(st.lists(st.lists(WORDS | st.text(max_size=5), max_size=4).map("".join), max_size=3))
def test_command_lines(args):
    found = in_one_line(lambda: parse(["main", f"--config={COMPOSITE}", *args]))
    assert found is None or isinstance(found, Command)


PARTS = [
    "convfixed",
    "convq",
    "convk",
    "dot_product",
    "_",
    "+",
    "7",
    "-1",
    "depth",
    "mixed",
    "no_act",
    "conv",
    "99999999",
]


@fuzzed
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=5).map("_".join))
def test_flags_of_the_reference(text):
    in_one_line(lambda: reference_names.parse_kernel(text))
    in_one_line(lambda: reference_names.parse_projection("qk", text))


@fuzzed
@given(st.dictionaries(st.sampled_from([*reference_names.DEFAULTS, "other"]), JSON, max_size=4))
def test_configurations_of_the_reference(config):
    in_one_line(lambda: reference_names.model_config(config, "float32"))


@fuzzed
@given(BYTES | JSON.map(lambda value: json.dumps(value).encode()), st.sampled_from(["config", "data", "summary"]))
def test_files_of_a_run_folder(content, name):
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(path)
        (folder.path / "config.json").write_text("{}")
        (folder.path / f"{name}.json").write_bytes(content)
        folder.metrics.write_bytes(content + b"\n")
        in_one_line(lambda: folder.check_belongs({"seed": 0, "train": {"steps": 1}, "resume": {"allow": ()}}))
        in_one_line(folder.started_with)
        in_one_line(lambda: folder.read(name))
        assert all(isinstance(row["step"], int) for row in folder.rows())
        assert all(row["step"] <= 3 for row in folder.keep_rows(3))
        (folder.checkpoints / "3").mkdir(parents=True)
        (folder.checkpoints / "3" / checkpoint.MANIFEST).write_bytes(content)
        (folder.checkpoints / "3" / "file").write_bytes(content)
        assert checkpoint.newest_whole(folder.checkpoints) is None
        checkpoint.surplus(folder.checkpoints, 3, 1)


def test_what_is_wrong_is_seen():
    with pytest.raises(AssertionError):
        in_one_line(lambda: (_ for _ in ()).throw(UserError("two\nlines")))
