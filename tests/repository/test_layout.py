"""The folders of the package: what the map says of them is true, and they stay apart."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bhpeft_pyro"
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]

FAMILIES = {  # the base class of each family to the folder that may tell its members apart
    "Guide": "guides",
    "Likelihood": "likelihoods",
    "Forecast": "forecast",
    "Posterior": "posterior",
    "Kind": "peft",
}
TOLD_APART = {"Function", "MixturePrior"}  # left to replace by a method or an attribute
FOREIGN = {"arviz", "peft", "sklearn", "mlflow", "ray"}  # imported in integrations/ alone


def parsed(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text())


def parts_of_the_map() -> dict[str, int]:
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
        for path in PACKAGE.iterdir()
        if path.name != "py.typed" and not path.name.startswith(("_", "."))
    }
    assert parts_of_the_map().keys() == there


def test_each_layer_knows_only_those_above_it_in_the_map() -> None:
    rows = parts_of_the_map()
    for path in FILES:
        parts = path.with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        # Imports inside functions or for type checking only are allowed to look down.
        for node in parsed(path).body:
            if not isinstance(node, ast.ImportFrom) or node.level != len(parts):
                continue  # not from the top of the package
            named = [node.module] if node.module else [alias.name for alias in node.names]
            for name in named:
                other = name.split(".")[0]
                other = "peft" if other == "presets" else other
                if other in rows:
                    assert rows[other] <= rows[parts[0]], f"{path} imports {other}"


def test_a_file_is_found_by_its_name() -> None:
    counts = Counter(path.name for path in FILES)
    del counts["__init__.py"]
    assert [name for name, count in counts.items() if count > 1] == []
    assert len([path for path in FILES if len(path.parts) == 1]) <= 4


def test_libraries_that_few_need_are_imported_in_integrations_alone() -> None:
    for path in FILES:
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                allowed = path.parts[0] == "integrations"
                assert allowed or name.split(".")[0] not in FOREIGN, f"{path} imports {name}"


def families() -> dict[str, str]:
    """Class to the folder of its family: all that derive from the bases, and priors."""
    homes, bases = dict(FAMILIES), {}
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and path.parts[0] == "priors":
                homes[node.name] = "priors"
            elif isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    for _ in bases:  # as deep as they go
        for name, above in bases.items():
            homes.update((name, homes[base]) for base in above if base in homes)
    return homes


def classes_asked_for(path: Path) -> set[str]:
    """The classes of this package in the second arguments of `isinstance`."""
    nodes = [*ast.walk(parsed(path))]
    imported = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    asked = {
        name.id
        for node in nodes
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
        for name in ast.walk(node.args[1])
        if isinstance(name, ast.Name)
    }
    return asked & imported


def test_members_of_a_family_are_told_apart_in_its_folder_alone() -> None:
    """Elsewhere a method or an attribute answers. Whether something is a guide at all may be asked
    anywhere."""
    homes = families()
    for path in FILES:
        asked = classes_asked_for(path) - FAMILIES.keys() - TOLD_APART
        elsewhere = {name for name in asked & homes.keys() if homes[name] not in path.parts}
        assert not elsewhere, f"{path} tells {', '.join(elsewhere)} apart"
