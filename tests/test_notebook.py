"""The notebook runs, and its two files say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.usefixtures("minilm_path", "sentiment")
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("BHPEFT_SMALL", "1")
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    where = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "negative ELBO" in printed and "before" in printed


def test_notebook_and_script_say_the_same() -> None:
    jupytext = pytest.importorskip("jupytext")
    script, notebook = (jupytext.read(NOTEBOOKS / f"quickstart.{end}") for end in ("py", "ipynb"))
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]


def test_kept_outputs_are_whole_and_name_no_machine() -> None:
    """Every cell that ran has its outputs; no error, no home directory, no warning in them."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    text = str(outputs)
    for word in ("site-packages", "/home/", "/root/", "/Users/"):
        assert word not in text, f"the outputs show {word}"
