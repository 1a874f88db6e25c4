"""What an import, and the program's help, bring with them."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

import bhpeft_pyro
from bhpeft_pyro.base import names
from bhpeft_pyro.base.checks import Extra, optional_library
from bhpeft_pyro.cli import options
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import GUIDES, PRESETS, autoguide
from bhpeft_pyro.peft import presets
from bhpeft_pyro.testing import tiny_model

DEAR = ("arviz", "arviz_stats", "matplotlib", "peft", "torchmetrics", "typer", "xarray")
HEAVY = ("torch", "pyro", "transformers", "datasets", "numpy", "pandas", "matplotlib", "arviz")


def run(code: str) -> list[str]:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout.splitlines()


def test_an_import_waits_for_nothing_that_only_some_functions_need() -> None:
    """Metrics brought torchmetrics and scipy.signal, streams Matplotlib, a fit's schedules the
    Trainer and Hugging Face's peft: a fifth of the time."""
    (modules,) = run(
        "import sys, bhpeft_pyro as bh\n"
        "for name in bh.__all__: getattr(bh, name)\n"
        "print(*sys.modules)"
    )
    assert [name for name in DEAR if name in modules.split()] == []


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["fit", "--help"],
        ["fit", "--no"],
        ["fit", "--preset", "lore"],
        ["fit", "no.csv", "--out", "x"],
        ["fit", "no.xlsx", "--out", "x"],
        ["predict", "no", "."],
        ["update", ".", "no.csv", "--out", "x"],
        ["distill", ".", "no.csv"],
        ["report", ".", "no.csv"],
        ["fit", __file__ + "/../x.csv", "--out", "x", "--validation", "no.csv"],
    ],
)
def test_the_program_answers_without_what_is_slow_to_import(words: list[str]) -> None:
    *_, modules = run(
        "import sys\nfrom bhpeft_pyro.cli.app import app\n"
        f"try: app({words!r})\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    assert [name for name in HEAVY if name in modules.split()] == []


def test_names_that_options_know_are_those_there_are() -> None:
    assert (*GUIDES, *PRESETS) == get_args(names.GuideName)
    assert tuple(presets.__all__) == get_args(names.Preset)
    points = [name for name in GUIDES if autoguide(name, tiny_model(())).point]
    assert points == list(options.POINTS)
    assert get_args(names.Family) == tuple(name for name in GUIDES if name != "delta")


LIBRARIES = {
    "mlflow": ("mlflow",),
    "peft": ("peft",),
    "ray": ("ray",),
    "serve": ("starlette", "uvicorn", "jinja2", "prometheus_client", "python_multipart"),
    "sheets": ("openpyxl", "odf"),
}
"""By extra, the modules that only it installs."""


def metadata() -> ConfigParser:
    parser = ConfigParser()
    parser.read(Path(__file__).parents[2] / "setup.cfg")
    return parser


def names_of(requirements: str) -> set[str]:
    """Distributions as modules are named; an extra of this package by its own name."""
    lines = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    words = {re.split(r"[><=,\[]", line, maxsplit=1)[0] for line in lines}
    renamed = {"pyyaml": "yaml", "scikit_learn": "sklearn", "pyro_ppl": "pyro", "odfpy": "odf"}
    found = {word.lower().replace("-", "_") for word in words}
    return {renamed.get(word, word) for word in found}


def test_what_is_imported_is_installed_with_the_package_or_by_an_extra() -> None:
    root = Path(bhpeft_pyro.__file__).parent
    imported = set()
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    others = imported - {*sys.stdlib_module_names, "bhpeft_pyro"}
    hard = names_of(metadata()["options"]["install_requires"])
    brought = {"xarray", "arviz_stats", "pyarrow", "tokenizers"}  # by ArviZ and Hugging Face
    assert others - hard - brought <= {name for names in LIBRARIES.values() for name in names}
    assert hard - {"datasets"} <= others | {"datasets"}


def test_extras_are_complete_and_named_when_a_library_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extras = metadata()["options.extras_require"]
    assert {*LIBRARIES} == {*get_args(Extra)}
    whole = extras["all"].split("[")[1].rstrip("]\n").split(",")
    assert {*whole} == {*LIBRARIES, "netcdf"}
    for extra, libraries in LIBRARIES.items():
        assert {*libraries} <= names_of(extras[extra])
        for library in libraries:
            monkeypatch.setitem(sys.modules, library, None)
            needed = rf"{library}: pip install 'bhpeft_pyro\[{extra}\]'"
            with pytest.raises(ConfigError, match=needed):
                optional_library(library, extra)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mlflow", "ray"])
def test_an_integration_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"bhpeft_pyro.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"need {name}: pip install 'bhpeft_pyro\[{name}\]'"):
        import_module(f"bhpeft_pyro.integrations.{name}")


def test_no_module_hides_what_the_package_exports() -> None:
    """An import of a module `bhpeft_pyro.plan` would replace the function `bhpeft_pyro.plan`."""
    modules = {info.name for info in pkgutil.iter_modules(bhpeft_pyro.__path__)}
    assert not modules & {*bhpeft_pyro._HOMES}


def test_type_checkers_see_the_names_that_are_imported_when_they_are_used() -> None:
    tree = ast.parse(Path(bhpeft_pyro.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name
        for node in checked.body
        for alias in node.names  # type: ignore[attr-defined]
    }
    assert seen == {*bhpeft_pyro._HOMES, *bhpeft_pyro._MODULES} >= {*bhpeft_pyro.__all__}
    for name in bhpeft_pyro.__all__:
        assert getattr(bhpeft_pyro, name) is not None and name in dir(bhpeft_pyro)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bhpeft_pyro.nothing  # noqa: B018
