"""What XLA must be told for the same bits again, and where it can't be."""

import jax
import pytest
import tiny

from convattn_jax import determinism, pretrain
from convattn_jax.config import UserError


@pytest.mark.parametrize(
    ("workdir", "why"), [("gs://bucket/run", "can name no bucket"), ("my runs/a", "can't hold whitespace")]
)
def test_a_run_folder_that_a_flag_cannot_name_is_refused(monkeypatch, workdir, why):
    monkeypatch.setenv("XLA_FLAGS", "--before")
    with pytest.raises(UserError, match=f"--workdir={workdir}, but XLA_FLAGS {why}.*: choose a"):
        determinism.ask_for(workdir)
    assert determinism.os.environ["XLA_FLAGS"] == "--before"


def test_a_gpu_run_without_kept_choices_is_refused_and_told_how(tmp_path, monkeypatch):
    jax.devices()  # JAX starts with the flags of all tests, not those below
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", determinism.EXCLUDED)
    with pytest.raises(UserError, match=r"train\.deterministic: .*call .*determinism\.ask_for\(workdir\) before jax"):
        pretrain.run(tiny.config(tmp_path, train__deterministic=True), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    determinism.ask_for(str(tmp_path / "run"))
    assert determinism.is_asked_for()
