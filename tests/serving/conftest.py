"""Rounds that are served: three that follow each other, on the tiny transformer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from saves import backbone_in
from services import LIMITS, network_in, started

import bhpeft_pyro as bh
from bhpeft_pyro.data import Columns
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.serving.engine import Engine
from bhpeft_pyro.serving.rounds import Served, Source
from bhpeft_pyro.testing import tiny_examples

pytest.importorskip("starlette")


def rows(count: int, seed: int) -> dict[str, list[str]]:
    texts = tiny_examples(count, seed).texts
    return {"text": [*texts], "label": ["bad", "good"] * (count // 2)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved posteriors march, april and may; april has a promise. `tiny` is their backbone."""
    root = tmp_path_factory.mktemp("served")
    backbone_in(root / "tiny")
    network = network_in(root, [bh.peft.LoRA(("query",), rank=2)], 2)
    columns = Columns(label_names=["bad", "good"])
    quick = {"max_steps": 20, "progress": False}
    march = bh.fit(Model(network), "normal", rows(60, 0), columns=columns, **quick)
    april = march.update(rows(60, 1), **quick).promise(rows(200, 2), error=0.4)
    may = april.update(rows(60, 3), **quick)
    days = {"march": march, "april": april, "may": may}
    for day, (name, posterior) in enumerate(days.items(), 1):
        posterior = posterior.with_report(created=f"2026-01-0{day}T00:00:00+00:00")
        posterior.save(root / "runs" / name)
    return root


@pytest.fixture(scope="session")
def source(folder: Path) -> Source:
    return Source(folder / "runs", device="cpu")


@pytest.fixture(scope="session")
def april(source: Source) -> Served:
    return source.load("april")


@pytest.fixture(scope="session")
def may(source: Source, april: Served) -> Served:
    return source.load("may", beside=april)


@pytest.fixture
def copied(folder: Path, tmp_path: Path, april: Served) -> Served:
    """April, in a folder of its own."""
    shutil.copytree(folder / "runs", tmp_path / "runs")
    return replace(april, folder=tmp_path / "runs" / "april")


@pytest.fixture
def engine(april: Served) -> Iterator[Engine]:
    """An engine that has not begun."""
    made = Engine(april, LIMITS)
    yield made
    made.close()


@pytest.fixture
def running(april: Served) -> Iterator[Engine]:
    with started(Engine(april, LIMITS)) as made:
        yield made
