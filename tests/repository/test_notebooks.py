"""The notebooks run, and their two files say the same."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PRINTED = {
    "quickstart": ("negative ELBO", "before"),
    "priors": ("ten times wider", "adapter.up"),
    "choosing-a-guide": ("times delta", "k-hat", "started at 0.001", "data sets (exact", "ECE"),
    "updating-under-drift": ("keep 0.5", "tweets put right"),
    "reading-a-posterior": ("change.lora.query", "  after", "round 2 of MeanFieldGuide(normal)"),
    "ratings": ("in 90 % interval", "raters' sd and aleatoric sd", "AUROC of epistemic"),
    "trained-adapter": ("posterior  accuracy", "go to a person", "AUROC", "largest difference"),
    "answering-and-labelling": ("promise: of the texts", "wrong among these", "promise after the"),
    "commonsense": ("MiniLM, encoder", "decoder", "likeliest", "AUROC"),
}

every = pytest.mark.parametrize("name", PRINTED)


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS.iterdir() if path.suffix == ".py"} == PRINTED.keys()


@every
def test_no_script_hides_a_package(name: str) -> None:
    """A kernel started beside `arviz.py` would import that."""
    found = find_spec(name)
    assert found is None or found.origin is None  # a folder of tests hides nothing from a kernel


@every
@pytest.mark.slow
@pytest.mark.usefixtures("minilm_path", "sentiment")
def test_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("BHPEFT_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))  # `tools`, which is `..` in a clone
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert all(word in printed for word in PRINTED[name])


@every
def test_notebook_and_script_say_the_same(name: str) -> None:
    jupytext = pytest.importorskip("jupytext")
    script, notebook = (jupytext.read(NOTEBOOKS / f"{name}.{end}") for end in ("py", "ipynb"))
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]


@every
def test_kept_outputs_are_whole_and_name_no_machine(name: str) -> None:
    """Every cell that ran has its outputs; no error, no home directory, no warning in them."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    text = str(outputs)
    for word in ("site-packages", "/home/", "/root/", "/Users/"):
        assert word not in text, f"the outputs show {word}"
