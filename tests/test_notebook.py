"""The example notebook, executed as a user executes it, on the real model of `make model`."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NOTEBOOK = ROOT / "examples/prune.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.real
@pytest.mark.slow
def test_the_notebook_runs_and_shows_tables_and_plots(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    assert MODEL.is_file(), f"{MODEL} is missing; `make model` fetches it"
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    inspected, pruned = (data["text/html"] for data in shown if "text/html" in data)
    assert "channels" in inspected and "kv_groups" in inspected and "share of model" in inspected
    assert "perplexity" in pruned and "pruned by 20%" in pruned and "<script" not in pruned
    assert any("image/png" in data for data in shown)
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "dense, 134,515,008 parameters" in said and "pruned, " in said
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "verify.json").read_text())["passed"]
