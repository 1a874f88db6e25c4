"""The documentation site builds without a warning or the network, and is whole."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import bhpeft_pyro

ROOT = Path(__file__).parents[2]

# All other folders and modules at the top stand in the reference, and so do the integrations that
# need no package that may be missing.
INTERNAL = {"cli"}
INTEGRATIONS = ("arviz", "hub", "label_studio", "peft_in", "peft_out", "sklearn")

OFFLINE = """
import socket, sys
def refuse(*args, **kwargs): raise OSError("the site must build without the network")
socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HTML pages, built from a copy: autosummary writes its pages beside the others."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    root = tmp_path_factory.mktemp("site")
    generated = shutil.ignore_patterns("_build", "api", "notebooks")
    shutil.copytree(ROOT / "docs", root / "docs", ignore=generated)
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    html = root / "html"
    command = [sys.executable, "-c", OFFLINE, "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run(
        [*command, str(root / "docs"), str(html)], capture_output=True, text=True, cwd=ROOT
    )
    assert built.returncode == 0, built.stderr
    return html


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Formulas, fonts, scripts and pictures are there without a network; links may lead away."""
    loads = re.compile(
        r"""(?:<(?:script|img|iframe|link)\b[^>]*?["'=\s]|url\(["']?)(?:https?:)?//[^>)]*"""
    )
    files = [path for end in ("html", "css") for path in site.rglob(f"*.{end}")]
    assert not {found.group() for path in files for found in loads.finditer(path.read_text())}
    formulas = re.findall(r'<math [^>]*display="(\w+)"', (site / "method.html").read_text())
    assert {*formulas} == {"inline", "block"}


def entries(html: Path) -> Iterator[str]:
    """The names of Python objects in the inventory that other projects link to."""
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((html / "objects.inv").read_bytes(), uri="")
    for role, objects in inventory.data.items():
        if role.startswith("py:"):
            yield from objects


def resolve(name: str) -> object:
    """What a dotted name stands for, as after `import`; None for an attribute of instances."""
    package, *parts = name.split(".")
    value: object = importlib.import_module(package)
    for part in parts:
        package = f"{package}.{part}"
        if not hasattr(value, part) and isinstance(value, ModuleType):
            with contextlib.suppress(ImportError):
                importlib.import_module(package)
        value = getattr(value, part, None)
    return value


def public() -> Iterator[ModuleType]:
    """The package, its modules at the top that are not internal, and the modules they export."""
    yield bhpeft_pyro
    waiting = [
        importlib.import_module(f"bhpeft_pyro.{info.name}")
        for info in pkgutil.iter_modules(bhpeft_pyro.__path__)
        if info.name not in INTERNAL and not info.name.startswith("_")
    ]
    waiting += [
        importlib.import_module(f"bhpeft_pyro.integrations.{name}") for name in INTEGRATIONS
    ]
    while waiting:
        module = waiting.pop()
        yield module
        members = (getattr(module, name) for name in getattr(module, "__all__", ()))
        waiting += [member for member in members if isinstance(member, ModuleType)]


@pytest.mark.slow
def test_every_public_object_is_in_the_reference(site: Path) -> None:
    documented = {id(resolve(name)) for name in entries(site)}
    missing = [
        f"{module.__name__}.{name}"
        for module in public()
        for name in getattr(module, "__all__", ())
        if id(getattr(module, name)) not in documented
    ]
    assert not missing


def test_internal_modules_are_there() -> None:
    assert {info.name for info in pkgutil.iter_modules(bhpeft_pyro.__path__)} >= INTERNAL


@pytest.mark.slow
def test_every_page_is_built_and_in_a_list_of_pages(site: Path) -> None:
    """Sphinx warns of a page in no toctree; a page that is left out altogether it does not see."""
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    built = {path.stem for path in site.glob("*.html")} - {"genindex", "search", "py-modindex"}
    assert pages == built
    front = (site / "index.html").read_text()
    assert not {page for page in pages - {"index"} if f'href="{page}.html"' not in front}


@pytest.mark.slow
def test_notebooks_show_their_outputs(site: Path) -> None:
    """They are not run again for the site."""
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        assert "cell_output" in page
    linked = (site / "own-model.html").read_text()
    assert 'href="notebooks/priors.html"' in linked


@pytest.mark.slow
def test_constants_have_their_docstrings(site: Path) -> None:
    assert "by the names that" in (site / "api" / "bhpeft_pyro.guides.html").read_text()
    assert "&lt;factory&gt;" not in (site / "api" / "bhpeft_pyro.plots.html").read_text()
