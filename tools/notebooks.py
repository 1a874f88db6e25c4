"""`make notebooks`: run the notebooks from their scripts, and keep what they show.

A notebook is a pair: NAME.py is what one edits, NAME.ipynb the same cells with their outputs. Names
as arguments run these alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import jupytext
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(script: Path) -> None:
    """Run all cells in an empty folder, and write the .ipynb beside the script."""
    notebook = jupytext.read(script)
    with tempfile.TemporaryDirectory() as folder:
        # In a clone they find `tools` beside their folder.
        os.environ["PYTHONPATH"] = str(NOTEBOOKS.parent)
        NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            coalesce_streams=True,  # one output a cell, not one a line
            resources={"metadata": {"path": folder}},
        ).execute()
    # What another run would change although nothing has changed: times, and ids of widgets.
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
    jupytext.write(notebook, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in NOTEBOOKS.glob("*.py")):
        print(name, flush=True)
        execute(NOTEBOOKS / f"{name}.py")
