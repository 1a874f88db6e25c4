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
TOLD_APART = {"Function"}  # left to replace by a method or an attribute
FOREIGN = {"arviz", "peft", "mlflow", "ray"}  # imported in integrations/ alone


def parsed(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text())


def rows_of_the_map() -> list[tuple[str, set[str]]]:
    """Each part of the package in the map of the code, with the files that its row names."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    row = re.compile(r"^\| `bhpeft_pyro/([\w/]+?)(?:\.py|/)`[^|]*\|[^|]*\|([^|]*)\|$", re.MULTILINE)
    named = re.compile(r"`(\w+)`")
    return [
        (part, {*named.findall(re.sub(r"\([^)]*\)", "", files))})
        for part, files in row.findall(text)
    ]


def test_map_is_complete() -> None:
    """Every module at the top and every folder has a row, which names all its files."""
    there: dict[str, set[str]] = {}
    for path in FILES:
        if len(path.parts) == 1 and path.stem not in ("__init__", "__main__"):
            there[path.stem] = set()
        elif len(path.parts) > 1:
            files = there.setdefault(path.parent.as_posix(), set())
            files |= {path.stem} - {"__init__"}
    described = dict(rows_of_the_map())
    assert described.keys() == there.keys()
    for part, files in there.items():
        assert described[part] == files, f"docs/architecture.md, the row of {part}"


def test_each_layer_knows_only_those_above_it_in_the_map() -> None:
    rows: dict[str, int] = {}
    for number, (part, _) in enumerate(rows_of_the_map()):
        rows.setdefault(part.split("/")[0], number)
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
