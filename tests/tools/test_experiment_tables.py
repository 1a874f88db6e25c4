"""Tables of the experiments with streams, from results made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tools.experiments import stream_tables


def result(arm: str, matrix: list[list[float]]) -> dict[str, Any]:
    """Two rounds of 10 and 30 rows with a test each."""
    rows: list[dict[str, Any]] = [
        {"batch": name, "id": name, "examples": n, "test/a": line[0], "test/b": line[1]}
        for name, n, line in zip("ab", (10, 30), matrix, strict=True)
    ]
    rows[0] |= {"untrained/a": 0.5, "untrained/b": 0.5}
    rows[1] |= {"accuracy": 0.75, "nll": 0.5}
    setting = dict.fromkeys(("protocol", "preset", "rows", "test", "epochs", "samples"), 0)
    return {"arm": arm, **setting, "rounds": rows}


def test_aims_are_met_or_not_by_the_means_over_seeds() -> None:
    results = [
        result("posterior as prior", [[0.9, 0.5], [0.88, 0.90]]),
        result("posterior as prior", [[0.9, 0.5], [0.90, 0.90]]),
        result("warm start only", [[0.9, 0.5], [0.5, 0.9]]),
        result("deterministic sequential", [[0.9, 0.5], [0.8, 0.9]]),
        result("all data so far", [[0.9, 0.5], [0.92, 0.92]]),
    ]
    table = stream_tables.aims(results, {"posterior as prior": 1.2, "warm start only": 1.0})
    aim, arm, measured, met = (list(column.cells) for column in table.columns)
    assert set(arm) == {"posterior as prior"} and len(aim) == 3
    assert measured == [
        "0.010 against 0.100",
        "0.895 against 0.920 (average accuracy)",
        "1.20",
    ]
    assert met == ["yes", "no", "no"]
    summary = stream_tables.summary(results[0])
    assert summary["forgetting"] == pytest.approx(0.02)
    assert summary["forward_transfer"] == pytest.approx(0.0)
    mean = stream_tables.average(results[:2])
    assert mean.matrix.tolist() == [[0.9, 0.5], [pytest.approx(0.89), 0.9]]
