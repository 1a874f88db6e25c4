"""Posteriors that were made up by somebody who knows the format: they are refused when they are
read, and not when they are used."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saves import load, retensor, rewrite
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.decisions.watching import watched
from bhpeft_pyro.errors import SaveError
from bhpeft_pyro.posterior.saving import (
    FILE,
    _check_distinct,
    packed,
    read,
    read_lineage,
    read_plain,
)
from bhpeft_pyro.testing import tiny_examples, tiny_model

NOTED = {
    "promise/answered": 10.0,
    "promise/wrong": 1.0,
    "promise/error": 0.4,
    "promise/broken": 0.0,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    posterior = bh.fit(tiny_model(()), "normal", tiny_examples(40), max_steps=3, progress=False)
    posterior = posterior.distill(tiny_examples(60, seed=1), epochs=1, progress=False)
    posterior = posterior.promise(tiny_examples(100, seed=2), error=0.4)
    return posterior.save(tmp_path_factory.mktemp("crafted") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def without(folder: Path, name: str) -> None:
    """Remove a tensor."""
    plain, tensors = read(folder)
    del tensors[name]
    (folder / FILE).write_bytes(b"".join(packed(plain, tensors)))


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("novelty", "count", math.nan, "novelty: count=nan"),
        ("novelty", "count", math.inf, "novelty: count=inf"),
        ("novelty", "count", -1, "novelty: count=-1"),
        ("novelty", "count", None, "novelty: count=None"),
        ("promised", "error", 0, "error=0"),
        ("promised", "error", math.nan, "error=nan"),
        ("promised", "threshold", math.nan, "threshold=nan"),
        ("promised", "rows", 0, "rows=0"),
        ("promised", "answered", -1, "answered=-1"),
        ("promised", "answered", 101, "promised: .* of 101 of 100 rows"),
        ("promised", "wrong", 101, "promised: 101 of .* of 100 rows"),
        ("student", "passes", None, "passes=None"),
        ("student", "divergence", "x", "divergence='x'"),
    ],
)
def test_a_number_that_is_none(
    folder: Path, part: str, field: str, value: object, message: str
) -> None:
    rewrite(folder, lambda content: content[part].update({field: value}))
    with pytest.raises(SaveError, match=message):
        load(folder)


@pytest.mark.parametrize("part", ["novelty", "promised", "student"])
def test_a_number_that_is_missing(folder: Path, part: str) -> None:
    field = {"novelty": "count", "promised": "rows", "student": "texts"}[part]
    rewrite(folder, lambda content: content[part].pop(field))
    with pytest.raises(SaveError, match=f"missing or unknown parts: .*{field}"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: torch.full_like(labels, 2**40),  # of which 8 TiB were asked for
        lambda labels: torch.full_like(labels, 2),
        lambda labels: labels - 2,
        Tensor.double,
    ],
)
def test_a_label_of_a_promise_that_is_no_class(
    folder: Path, change: Callable[[Tensor], Tensor]
) -> None:
    retensor(folder, lambda name: name == "promised.label", change)
    with pytest.raises(SaveError, match="promised: its labels are no classes of 2"):
        load(folder)


@pytest.mark.parametrize("name", ["chance", "label", "miss"])
def test_a_promise_without_some_of_its_calibration(folder: Path, name: str) -> None:
    without(folder, f"promised.{name}")
    with pytest.raises(SaveError, match=f"promised: its calibration has no {name}"):
        load(folder)


@pytest.mark.parametrize("change", [Tensor.double, Tensor.half, Tensor.long, Tensor.bool])
@pytest.mark.parametrize("name", ["points", "coefficients", "center", "scale", "length"])
def test_a_student_with_tensors_of_another_type(
    folder: Path, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    retensor(folder, lambda key: key == f"student.uncertainty.{name}", change)
    with pytest.raises(SaveError, match=f"{name} is torch..*; expected torch.float32"):
        load(folder)


def test_a_seed_of_a_split_that_is_none(folder: Path) -> None:
    rewrite(folder, lambda content: content["lineage"][0].update(split=2**70))
    with pytest.raises(SaveError, match="split="):
        load(folder)


def test_the_ids_of_forty_thousand_reports_are_compared_in_time(whole: Path) -> None:
    """It was each with each, for minutes, at every command."""
    (report,) = read_lineage(whole, read_plain(whole))
    reports = [copy(report) for _ in range(40_000)]
    for number, one in enumerate(reports):
        object.__setattr__(one, "id", f"r{number}")
    begun = time.process_time()
    _check_distinct(whole, reports)
    assert time.process_time() - begun < 1
    with pytest.raises(SaveError, match="continues round r5 twice"):
        _check_distinct(whole, [*reports, reports[5]])


@pytest.mark.parametrize("name", ["promise/answered", "promise/wrong", "promise/broken"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0])
def test_a_report_whose_count_of_a_promise_is_none(
    whole: Path, name: str, value: float | None
) -> None:
    posterior = load(whole)
    forecast = posterior.predict(tiny_examples(30, seed=5))
    metrics = {key: number for key, number in (NOTED | {name: value}).items() if number is not None}
    report = replace(posterior.report, metrics=metrics)
    with pytest.raises(SaveError, match=f"round {report.id}: its counts"):
        watched(forecast, [report])
    assert watched(forecast, [replace(report, metrics=NOTED)])["promise/broken"] == 0
