"""notebooks/: the notebook is its script, holds no outputs, and runs from its first cell to its last."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "notebooks" / "composite_attention.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")

jupytext = pytest.importorskip("jupytext")


def test_the_notebook_is_its_script_without_outputs():
    notebook, script = jupytext.read(NOTEBOOK), jupytext.read(SCRIPT)
    cells = [[(cell.cell_type, cell.source) for cell in file.cells] for file in (notebook, script)]
    assert cells[0] == cells[1], f"jupytext --sync {NOTEBOOK.relative_to(ROOT)}"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_pictures(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("CONVATTN_CHECKOUT", str(ROOT))
    monkeypatch.setenv("CONVATTN_NOTEBOOK_STEPS", "8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS")  # programs of this size are worth compiling well
    notebook = jupytext.read(SCRIPT)
    settings = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=settings).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert printed.count("step 8/8") == 2
    assert printed.count("of new sentences told apart") == 2
    assert (tmp_path / "runs" / "composite-8-steps" / "kernels.png").exists()
    assert not (ROOT / "runs" / "composite-8-steps").exists()
    assert os.listdir(tmp_path / "runs")
