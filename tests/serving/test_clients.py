"""Clients of others understand what the service answers."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from prometheus_client.parser import text_string_to_metric_families
from services import LIMITS, listening, probabilities

from bhpeft_pyro.serving.service import Service

TEXTS = ["w5 w20", "w6 w30 w7"]


@pytest.fixture(scope="module")
def address(source, april) -> Iterator[str]:
    with listening(Service(source, april, LIMITS).application) as where:
        yield where


def test_huggingface_hub_classifies_texts(address, april, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it asks this machine
    client = InferenceClient(f"{address}/predict")
    for text, expected in zip(TEXTS, probabilities(april, TEXTS), strict=True):
        scores = {element.label: element.score for element in client.text_classification(text)}
        assert scores["good"] == pytest.approx(expected, abs=1e-5) and len(scores) == 2
    (first,) = client.text_classification("w5", top_k=1, function_to_apply="softmax")
    assert first.score >= 0.5
    with pytest.raises(HfHubHTTPError, match="422"):
        client.text_classification("w5", function_to_apply="sigmoid")


def test_tritonclient_infers(address, april) -> None:
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(urlsplit(address).netloc)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("runs")
    assert client.get_model_metadata("runs")["versions"] == [april.id]
    column = http.InferInput("text", [2], "BYTES")
    column.set_data_from_numpy(np.array(TEXTS, dtype=object), binary_data=False)
    wanted = http.InferRequestedOutput("scores", binary_data=False)
    for outputs in (None, [wanted]):
        result = client.infer("runs", [column], outputs=outputs, request_id="7")
        assert result.as_numpy("scores")[:, 1] == pytest.approx(
            probabilities(april, TEXTS), abs=1e-5
        )
        assert result.get_response()["id"] == "7"
    column.set_data_from_numpy(np.array(TEXTS, dtype=object), binary_data=True)
    with pytest.raises(Exception, match="binary tensors"):
        client.infer("runs", [column])
    client.close()


def test_prometheus_reads_the_metrics(source, april) -> None:
    with listening(Service(source, april, LIMITS).application) as address:
        httpx.post(f"{address}/predict", json={"inputs": TEXTS}, timeout=60)
        httpx.post(f"{address}/predict", json={"inputs": ""}, timeout=60)
        text = httpx.get(f"{address}/metrics").text
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    values = {(one.name, *sorted(one.labels.values())): one.value for one in samples}
    assert values["bhpeft_requests_total", "/predict", "200"] == 1
    assert values["bhpeft_requests_total", "/predict", "422"] == 1
    assert values["bhpeft_batch_texts_sum",] == 2 and values["bhpeft_requests_running",] == 0
    assert values["bhpeft_promise_holds",] == 1
    texts = [one for one in samples if one.name == "bhpeft_texts_total"]
    assert sum(one.value for one in texts) == 2 and texts[0].labels["round"] == april.id


def test_the_description_of_the_paths_names_its_models(address) -> None:
    described = httpx.get(f"{address}/openapi.json").json()
    assert described["openapi"].startswith("3.")
    schemas = described["components"]["schemas"]
    for path in ("/predict", "/invocations", "/v2/models/runs/infer", "/feedback", "/admin/swap"):
        content = described["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert schemas[name]["type"] == "object"
    assert {*schemas["TextRequest"]["properties"]} >= {"inputs", "details", "parameters"}
