"""The service over HTTP: what it answers, refuses and drops."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from services import LIMITS, PATHS, held, listening, malformed, probabilities, until
from starlette.testclient import TestClient

from bhpeft_pyro.serving.rounds import Source
from bhpeft_pyro.serving.service import Service
from bhpeft_pyro.testing import tiny_examples

TEXTS = tiny_examples(40, seed=9).texts
ADMIN = {"authorization": "Bearer secret"}


@pytest.fixture
def service(source, april) -> Service:
    return Service(source, april, LIMITS, "secret")


@pytest.fixture
def client(service) -> Iterator[TestClient]:
    with TestClient(service.application) as made:
        yield made


def ask(client: Any, **payload: Any) -> Any:
    return client.post("/predict", json=payload)


def test_answers_name_their_round(client, april) -> None:
    response = ask(client, inputs=[*TEXTS[:3]], details=True)
    assert response.status_code == 200 and response.headers["x-bhpeft-round"] == april.id
    scores = [answer["scores"]["good"] for answer in response.json()]
    assert scores == pytest.approx(probabilities(april, TEXTS[:3]), abs=1e-5)
    assert {answer["round"] for answer in response.json()} == {april.id}
    (scored,) = {label["label"] for label in ask(client, inputs="w5").json()} - {"bad"}
    assert scored == "good"


def test_what_those_who_watch_ask_for(client, service, april) -> None:
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    info = client.get("/info").json()
    assert info["round"] == info["model_sha"] == april.id and info["method"] == "draws"
    assert info["max_client_batch_size"] == 16 and info["max_input_length"] == 32
    assert info["model_type"]["classifier"]["label2id"] == {"bad": 0, "good": 1}
    assert "at most 40% are wrong" in info["promise"]
    service.engine.close()
    assert client.get("/health").status_code == client.get("/ready").status_code == 503
    service.engine.start()


def test_other_paths_and_methods(client) -> None:
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/runs", "/ping",
                 "/v2/models/runs/ready"):  # fmt: skip
        assert client.get(path).status_code == 200
    assert client.get("/v2/models/other").status_code == 404

    for method, path, status in (("GET", "/", 404), ("GET", "/predict", 405)):
        response = client.request(method, path)
        assert response.status_code == status and response.json()["error"]
    assert response.headers["allow"] == "POST"


def test_rounds_are_exchanged_with_the_token_alone(
    client, service, april, may, monkeypatch
) -> None:
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "Bearer sécret"}):
        coded = {name: value.encode() for name, value in headers.items()}
        for path in ("/admin/swap", "/admin/rollback"):
            assert client.post(path, headers=coded).status_code == 401
    assert client.post("/admin/rollback", headers=ADMIN).status_code == 422
    assert client.post("/admin/rollback", headers={"authorization": "secret"}).status_code == 401
    bearer = {"authorization": "bearer secret"}  # of any case
    swapped = client.post("/admin/swap", headers=bearer)  # to the newest
    assert swapped.json() == {
        "round": may.id,
        "round_before": april.id,
        "warning": f"nothing is promised any more: round {may.id} has no promise; bhpeft promise "
        "makes one",
    }
    (reply,) = ask(client, inputs=["w5"], parameters={}, details=True).json()
    assert reply["answered"] is None and may.id in reply["no_promise"]
    assert ask(client, inputs="w5").headers["x-bhpeft-round"] == may.id
    assert client.get("/info").json()["round_before"] == april.id
    back = client.post("/admin/rollback", headers=ADMIN)
    assert back.json() == {"round": april.id, "round_before": may.id}
    named = client.post("/admin/swap", headers=ADMIN, json={"round": "march"})
    assert named.json()["round_before"] == april.id
    again = client.post("/admin/swap", headers=ADMIN, json={"round": "march"})
    assert again.json() == named.json()  # it is no step to go back
    for wrong in ({"round": "june"}, {"round": 3}, {"rond": "march"}, "march", [], 0):
        refused = client.post("/admin/swap", headers=ADMIN, json=wrong)
        assert refused.status_code == 422
    assert ask(client, inputs="w5").headers["x-bhpeft-round"] == named.json()["round"]
    with monkeypatch.context() as patch:
        patch.setattr(Source, "load", Mock(side_effect=MemoryError))
        refused = client.post("/admin/swap", headers=ADMIN)
        assert refused.status_code == 422 and "memory" in refused.json()["error"]
    service.token = "sécret"
    coded = {"authorization": "Bearer sécret".encode()}
    assert client.post("/admin/swap", headers=coded).status_code == 200
    service.token = None
    assert client.post("/admin/swap", headers=ADMIN).status_code == 401


def test_too_much_to_do_is_refused_and_then_taken_on(service, april) -> None:
    service.limits = replace(LIMITS, seconds=120.0)  # longer than any wait here
    with (
        held() as predictions,
        listening(service.application) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        with ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(ask, client, inputs="w5") for _ in range(20)]
            until(lambda: sum(future.done() for future in futures) == 12)
            assert client.get("/health").status_code == 200  # the event loop is free
            assert client.get("/ready").status_code == 503
            predictions.go.set()
        answers = [future.result() for future in futures]
        codes = [response.status_code for response in answers]
        assert sorted(codes) == [200] * 8 + [429] * 12
        refused = answers[codes.index(429)]
        assert refused.json()["error_type"] == "Overloaded"
        assert refused.headers["retry-after"] == "1"
        assert ask(client, inputs="w5").status_code == 200 and service.running == 0
        assert client.get("/ready").status_code == 200


def test_a_request_that_takes_too_long_is_given_up(service, client, april) -> None:
    service.limits = replace(LIMITS, seconds=0.1)
    with held():
        response = ask(client, inputs="w5")
    assert response.status_code == 429 and "0.1 seconds" in response.json()["error"]
    service.limits = LIMITS
    assert ask(client, inputs="w5").status_code == 200


def test_labels_that_take_long_are_not_given_up(service, client, april, monkeypatch) -> None:
    """They would be sent again, and count twice."""
    service.limits, seen = replace(LIMITS, seconds=0.05), service.feedback.seen(april)

    def slow(*_: Any) -> Any:
        time.sleep(0.2)
        return seen

    monkeypatch.setattr(service.feedback, "take", slow)
    response = client.post("/feedback", json={"text": "w5", "label": "bad"})
    assert response.status_code == 200 and response.json()["taken"] == 1


def test_a_bug_is_answered_counted_and_logged(service, client, monkeypatch, caplog) -> None:
    monkeypatch.setattr(service.engine, "ask", Mock(side_effect=ValueError("secret")))
    response = ask(client, inputs="w5")
    assert response.status_code == 500 and "server's log" in response.json()["error"]
    assert "secret" not in response.text and "ValueError: secret" in caplog.text
    line = 'bhpeft_requests_total{path="/predict",status="500"} 1.0'
    assert line in client.get("/metrics").text


def test_web_pages_are_refused(client) -> None:
    """A page that is open in a browser on this machine could post labels otherwise."""
    for path in PATHS:
        refused = client.post(path, json={}, headers={"origin": "https://evil.example"})
        assert refused.status_code == 403 and "web page" in refused.json()["error"]


def test_a_client_that_has_gone_is_dropped(service, april) -> None:
    """Its texts are not predicted, and its place is free at once."""
    seen: list[int] = []
    service.engine.noted = lambda texts, *_: seen.append(texts)
    with held() as predictions, listening(service.application) as address:
        body = json.dumps({"inputs": ["w5", "w6", "w7"]}).encode()
        head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        where = urlsplit(address)
        running = threading.Thread(target=httpx.post, args=(f"{address}/predict",), kwargs={
            "json": {"inputs": "w5"}, "timeout": 20})  # fmt: skip
        running.start()
        assert predictions.begun.wait(20)
        for _ in range(3):
            with socket.create_connection((where.hostname, where.port)) as connection:
                connection.sendall(head.encode() + body)
                until(lambda: service.running == 2)
            until(lambda: service.running == 1)
        assert service.engine._queue.qsize() == 3
        predictions.go.set()
        running.join(20)
        after = httpx.post(f"{address}/predict", json={"inputs": ["w8", "w9"]}, timeout=60)
        assert after.status_code == 200
    assert seen == [1, 2]


def test_a_body_that_is_too_large_is_not_read_to_its_end(service) -> None:
    with listening(service.application) as address:
        response = httpx.post(f"{address}/predict", json={"inputs": "w5 " * 10_000}, timeout=60)
        assert response.status_code == 413 and response.json()["error_type"] == "Validation"
        where = urlsplit(address)
        with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
            head = b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            connection.sendall(head + b"%x\r\n%s\r\n" % (21_000, b" " * 21_000))  # and no end
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_malformed_requests_are_the_clients_fault(client) -> None:
    made = random.Random(0)
    codes = set()
    for _ in range(1000):
        response = client.post(made.choice(PATHS), content=malformed(made))
        codes.add(response.status_code)
        assert response.status_code in (200, 413, 422), response.text
        if response.status_code != 200:
            assert {*response.json()} == {"error", "error_type"}
            assert "Traceback" not in response.text
    assert 422 in codes and ask(client, inputs="w5").status_code == 200
