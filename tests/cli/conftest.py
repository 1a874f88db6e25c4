"""What the tests of the commands read: data, a backbone, and posteriors on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from program import (
    NAMES,
    QUICK,
    TEXTS,
    UNLABELLED,
    bhpeft,
    loaded,
    write_csv,
    write_lines,
)
from saves import backbone_in

import bhpeft_pyro as bh

CELLS = [["art", "sport"], ["sport"], []] * 4  # several labels a text


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a backbone, and a posterior of classes with names."""
    root = tmp_path_factory.mktemp("cli")
    backbone_in(root / "tiny")
    write_csv(root / "train.csv", text=TEXTS, label=NAMES)
    write_csv(root / "new.csv", id=range(5), text=["w5 w9", "w6 w9", "w6", "w7 w8", "w33"])
    fit = ("fit", root / "train.csv", "--backbone", root / "tiny", "--components", 2, *QUICK)
    bhpeft(*fit, "--out", root / "run")
    return root


@pytest.fixture
def run(folder: Path) -> Path:
    return folder / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The run in a folder that a test may write into."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def posterior(folder: Path) -> bh.Posterior:
    return loaded(folder / "run", folder)


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts to distil a posterior on."""
    return write_csv(tmp_path_factory.mktemp("texts") / "texts.csv", text=UNLABELLED)


@pytest.fixture(scope="session")
def distilled(folder: Path, unlabelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The posterior with a student."""
    quick = ("--epochs", 1, "--device", "cpu")
    out = tmp_path_factory.mktemp("students") / "distilled"  # the same round, not beside it
    bhpeft("distill", folder / "run", unlabelled, *quick, "--out", out)
    return out


@pytest.fixture(scope="session")
def head_only(folder: Path) -> tuple[object, ...]:
    """Options of a quick fit under `normal`."""
    guide = ("--guide", "normal", "--preset", "head_only", "--max-steps", 3, "--device", "cpu")
    return ("--backbone", folder / "tiny", *guide)


@pytest.fixture(scope="session")
def labels(head_only: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with several labels a text, as CSV and as JSON lines, and a posterior of them."""
    root = tmp_path_factory.mktemp("labels")
    write_csv(root / "train.csv", text=TEXTS[:12], labels=[json.dumps(cell) for cell in CELLS])
    rows = ({"text": t, "labels": c} for t, c in zip(TEXTS[:12], CELLS, strict=True))
    write_lines(root / "train.jsonl", rows)
    bhpeft("fit", root / "train.csv", *head_only, "--out", root / "run")
    return root
