"""Rounds of every kind of label are served as `Posterior.predict` answers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from services import LIMITS
from starlette.testclient import TestClient
from students import fitted, table

from bhpeft_pyro.serving.loading import Served, Source
from bhpeft_pyro.serving.server import Service


@pytest.mark.parametrize("kind", ["class", "labels", "rating", "choice"])
def test_every_kind(kind: str, tmp_path: Path) -> None:
    posterior = fitted(kind)
    rows: Any = table(kind, 6, seed=5)
    served = Served(posterior, tmp_path)
    served.warm_up()
    expected = posterior.predict(rows).summary()
    inputs = {name: rows[name] for name in served.texts}
    with TestClient(Service(Source(tmp_path), served, LIMITS).application) as client:
        predictions = client.post("/invocations", json={"inputs": inputs}).json()["predictions"]
        for name, values in expected.items():
            got = [row[name] for row in predictions]
            if isinstance(values[0], float):
                assert got == pytest.approx(values, rel=1e-3, abs=1e-5)
            elif isinstance(values[0], str | int | list):
                assert got == values
        tensors = [
            {"name": name, "shape": [6], "datatype": "BYTES", "data": cells}
            for name, cells in inputs.items()
            if isinstance(cells[0], str)
        ]
        if kind != "choice":
            path = f"/v2/models/{tmp_path.name}/infer"
            outputs = client.post(path, json={"inputs": tensors}).json()["outputs"]
            assert [each["name"] for each in outputs if each["name"] != "scores"] == [*expected]
            scored = client.post("/predict", json={"inputs": rows["text"]}).json()
            assert len(scored) == 6 and all({*each} == {"label", "score"} for each in scored[0])
        target = posterior.columns.target(kind)
        columns = {**inputs, target: rows[target]}
        cells = zip(*columns.values(), strict=True)
        labelled = [dict(zip(columns, row, strict=True)) for row in cells]
        taken = client.post("/feedback", json={"rows": labelled})
        assert taken.status_code == 200 and taken.json()["labels"] == 6, taken.text
