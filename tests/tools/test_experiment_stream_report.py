"""Tables of the experiments with streams, from results made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tools.experiments import stream_report


def result(arm: str, matrix: list[list[float]]) -> dict[str, Any]:
    """Two rounds of 10 and 30 rows with a test each."""
    rows: list[dict[str, Any]] = [
        {"batch": name, "id": name, "examples": n, "test/a": line[0], "test/b": line[1]}
        for name, n, line in zip("ab", (10, 30), matrix, strict=True)
    ]
    rows[0] |= {"untrained/a": 0.5, "untrained/b": 0.5}
    rows[1] |= {"accuracy": 0.75, "nll": 0.5}
    setting = dict.fromkeys(
        ("protocol", "preset", "rows", "test", "epochs", "samples", "commit"), "0"
    )
    return {"arm": arm, **setting, "rounds": rows}


def test_a_summary_has_the_metrics_of_transfer() -> None:
    results = [
        result("posterior as prior", [[0.9, 0.5], [0.88, 0.90]]),
        result("posterior as prior", [[0.9, 0.5], [0.90, 0.90]]),
        result("deterministic sequential", [[0.9, 0.5], [0.8, 0.9]]),
    ]
    summary = stream_report.summary(results[0])
    assert summary["forgetting"] == pytest.approx(0.02)
    assert summary["forward_transfer"] == pytest.approx(0.0)
    mean = stream_report.average(results[:2])
    assert mean.matrix.tolist() == [[0.9, 0.5], [pytest.approx(0.89), 0.9]]
    whole, *_, costs = stream_report.tables(results, {"posterior as prior": 1.2})
    assert whole.text()["forgetting"].tolist() == ["0.010 ± 0.010", "0.100"]
    assert costs.text().to_numpy().tolist() == [["posterior as prior", "1.200"]]
