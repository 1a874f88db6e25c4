"""Rounds of every kind of label are served as `Posterior.predict` answers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from services import LIMITS
from starlette.testclient import TestClient
from students import fitted, table

from bhpeft_pyro.serving.rounds import Served, Source
from bhpeft_pyro.serving.service import Service


@pytest.mark.parametrize("kind", ["class", "labels", "rating", "choice"])
def test_every_kind(kind: str, tmp_path: Path) -> None:
    posterior = fitted(kind)
    rows: Any = table(kind, 6, seed=5)
    served = Served(posterior, tmp_path)
    assert len(served.sample) == 2
    expected = posterior.predict(rows).table().drop(columns=["text", "label"], errors="ignore")
    inputs = {name: rows[name] for name in served.texts}
    with TestClient(Service(Source(tmp_path), served, LIMITS).application) as client:
        named = client.get("/info").json()["model_type"]["classifier"]["id2label"]
        numbers = {str(i): str(i) for i in range(3)}  # of classes that nobody has named
        assert named == (numbers if kind in ("class", "labels") else {})
        predictions = client.post("/invocations", json={"inputs": inputs}).json()["predictions"]
        assert {row["round"] for row in predictions} == {posterior.report.id}
        for name, values in expected.items():
            numbers = isinstance(values[0], float)
            close: Any = pytest.approx([*values], rel=1e-3, abs=1e-5) if numbers else [*values]
            assert [row[name] for row in predictions] == close
        tensors = [
            {"name": name, "shape": [6], "datatype": "BYTES", "data": cells}
            for name, cells in inputs.items()
            if isinstance(cells[0], str)
        ]
        if kind != "choice":
            path = f"/v2/models/{tmp_path.name}/infer"
            outputs = client.post(path, json={"inputs": tensors}).json()["outputs"]
            data = {each["name"]: each["data"] for each in outputs}
            if "scores" in data:
                labels = outputs[-1]["parameters"]["labels"]
                scores = [row["scores"][label] for row in predictions for label in labels]
                assert data.pop("scores") == scores
            assert {*data} == {*expected}
            for name, values in data.items():
                null = "" if name == "reason" else False  # tensors have none
                cells = [null if row[name] is None else row[name] for row in predictions]
                texts = isinstance(cells[0], list | dict)
                assert values == ([json.dumps(cell) for cell in cells] if texts else cells)
            scored = client.post("/predict", json={"inputs": rows["text"]}).json()
            assert len(scored) == 6 and all({*each} == {"label", "score"} for each in scored[0])
        target = posterior.columns.target(kind)
        columns = {**inputs, target: rows[target]}
        cells = zip(*columns.values(), strict=True)
        labelled = [dict(zip(columns, row, strict=True)) for row in cells]
        taken = client.post("/feedback", json={"rows": labelled})
        assert taken.status_code == 200 and taken.json()["labels"] == 6, taken.text
