"""Files from strangers run no code and reach no place outside their folder."""

import ast
import os
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
from etils import epath

import convattn_jax
from convattn_jax import checkpoint, interop
from convattn_jax.config import UserError
from convattn_jax.glue import finished
from convattn_jax.run import RunFolder

PACKAGE = pathlib.Path(convattn_jax.__file__).parent
UNPICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "serialize_executable"}  # the last: JAX's
FORBIDDEN_MODULES = {*UNPICKLES, "yaml", "tarfile"}
FORBIDDEN_CALLS = {"eval", "extractall", "extract", "system", "unpack_archive"}


class Bomb:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), keywords


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_of_the_package_can_run_what_it_reads(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.module:
            imported |= {n.module.split(".")[0], *(alias.name for alias in n.names)}
    assert not imported & FORBIDDEN_MODULES
    for name, keywords in calls(tree):
        last = name.rsplit(".", 1)[-1]
        assert last not in FORBIDDEN_CALLS, name
        if name == "exec":
            assert path.name == "config.py"  # the configuration file a user names is a program, and documented as one
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") == "False", name
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"


def test_pickles_in_arrays_are_not_opened(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "predictions").mkdir()
    content = np.asarray([Bomb()], object)
    np.savez(tmp_path / "predictions" / "rte-test.npz", seed=content, allow_pickle=True)
    assert finished.prediction(folder, "rte", "test") == {}
    (tmp_path / "predictions" / "rte-test.npz").write_bytes(pickle.dumps(Bomb()))
    assert finished.prediction(folder, "rte", "test") == {}


def test_a_torch_file_is_opened_for_its_weights_only(tmp_path, monkeypatch):
    asked = {}

    def load(path, **kwargs):
        asked.update(kwargs)
        raise pickle.UnpicklingError("Weights only load failed")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, Tensor=np.ndarray))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        interop._read_weights(str(tmp_path / "pytorch_model.bin"))
    assert asked["weights_only"] is True


def test_a_checkpoint_reaches_nothing_outside_its_folder(tmp_path):
    folder = epath.Path(tmp_path) / "checkpoints" / "1"
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "a").write_text("numbers")
    checkpoint.write_manifest(folder, 1)
    assert checkpoint.damage(folder) is None
    (tmp_path / "secret").write_text("numbers")
    (folder / "params" / "a").unlink()
    os.symlink(tmp_path / "secret", folder / "params" / "a")  # even with the same contents
    assert checkpoint.damage(folder) == "params/a is changed"
    (folder / "params" / "a").unlink()
    os.symlink(tmp_path, folder / "params" / "a")  # nor does a loop hold it up
    assert checkpoint.damage(folder) == "params/a is changed"
    manifest = folder / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace("params/a", "../../secret"))
    assert checkpoint.damage(folder) == "manifest.json is unreadable"
    manifest.write_text("[" * 100_000)
    assert checkpoint.damage(folder) == "manifest.json is unreadable"
