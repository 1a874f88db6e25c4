"""Tables of the experiments with streams, from results made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tools.experiments import stream_report
from tools.experiments.arms import AT_ONCE


def result(arm: str, matrix: list[list[float]], seed: int) -> dict[str, Any]:
    """Two rounds of 10 and 30 rows with a test each."""
    rows: list[dict[str, Any]] = [
        {"batch": name, "id": name, "examples": n, "test/a": line[0], "test/b": line[1]}
        for name, n, line in zip("ab", (10, 30), matrix, strict=True)
    ]
    rows[1] |= {"accuracy": 0.75, "nll": 0.5, "test_nll/a": 0.2, "test_nll/b": 0.4}
    setting = dict.fromkeys(
        ("protocol", "preset", "rows", "test", "epochs", "samples", "commit"), "0"
    )
    return {"arm": arm, "seed": seed, **setting, "rounds": rows}


def test_arms_are_summarised_and_compared_on_the_seeds_that_both_have() -> None:
    """Seed 1 has no run of fine-tuning."""
    ours, plain = "posterior as prior", "deterministic sequential"
    results = [
        result(ours, [[0.9, 0.5], [0.88, 0.90]], 0),
        result(ours, [[0.9, 0.5], [0.90, 0.90]], 1),
        result(plain, [[0.9, 0.5], [0.8, 0.9]], 0),
    ]
    summary = stream_report.summary(results[0])
    expected = {"forgetting": 0.02, "accuracy at the end": 0.89, "nll at the end": 0.3}
    expected |= {"accuracy before learning": 0.75, "nll before learning": 0.5}
    expected |= {"backward transfer": -0.02}
    assert summary == pytest.approx(expected)
    whole, differences = stream_report.tables(results, "t")
    assert whole.text()["forgetting"].tolist() == ["0.010 ± 0.010", "0.100"]
    assert differences.text()["forgetting"].tolist() == ["-0.080"]
    at_once = stream_report.summary({**results[0], "arm": AT_ONCE})
    assert {name for name, value in at_once.items() if value == value} == {
        "accuracy at the end",
        "nll at the end",
    }
    costs = stream_report.costs({ours: 1.2})
    assert costs.text().to_numpy().tolist() == [[ours, "1.200"]]


def test_ratings_are_summarised_by_their_squared_error() -> None:
    """A stream scores ratings by minus their mean squared error."""
    rated = result("posterior as prior", [[-0.5, -2.0], [-0.8, -0.4]], 0)
    rated["rounds"][1]["mse"] = rated["rounds"][1].pop("accuracy")
    summary = stream_report.summary(rated)
    assert summary["mse before learning"] == 0.75
    assert summary["mse at the end"] == pytest.approx(0.6)
    assert summary["forgetting"] == pytest.approx(0.3)
