"""What a request must be like: its host, its token, its version and the form of its body."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator

import pytest
from services import LIMITS
from starlette.requests import Request
from starlette.testclient import TestClient

from bhpeft_pyro.serving.service import Service, _check_token

PATHS = ("/health", "/ready", "/info", "/feedback", "/metrics", "/v2", "/v2/models/runs")


@pytest.fixture
def service(source, april) -> Service:
    return Service(source, april, LIMITS, hosts=["texts.example"])


@pytest.fixture
def client(service) -> Iterator[TestClient]:
    with TestClient(service.application) as made:
        yield made


def test_hosts_that_are_not_this_one_are_refused(client) -> None:
    """A web page reads nothing by making its own name lead to this machine."""
    for path in PATHS:
        refused = client.get(path, headers={"host": "evil.example:8080"})
        assert refused.status_code == 403 and "--allow-host" in refused.json()["error"]
    for path in ("/predict", "/invocations", "/feedback", "/admin/swap"):
        refused = client.post(path, json={}, headers={"host": "evil.example"})
        assert refused.status_code == 403
    for host in ("127.0.0.1.evil.example", "evil.example.", "a.b:x", "texts.example.x"):
        assert client.get("/info", headers={"host": host}).status_code == 403


def test_hosts_of_this_machine(client) -> None:
    for host in (
        *("127.0.0.1:8080", "localhost:8080", "[::1]:8080", "10.0.0.7", "bhpeft", "bhpeft:80", ""),
        *("texts.example", "TEXTS.example:443"),
    ):
        assert client.get("/info", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("token", ["secret ", "secret\n", "voilà", " à", "a b"])
def test_tokens_of_all_characters_are_right(client, service, token) -> None:
    service.token = token
    coded = b"Bearer " + token.encode().strip()  # as a server reads it
    sent = {"authorization": coded}
    assert client.post("/admin/rollback", headers=sent).status_code == 422  # there is no round
    for other in (b"Bearer ", b"Bearer", coded[:-1], coded + b"x"):
        assert client.post("/admin/rollback", headers={"authorization": other}).status_code == 401


def test_a_token_may_have_bytes_that_are_no_text() -> None:
    headers = [(b"authorization", b"Bearer s\xe9cret")]
    _check_token(Request({"type": "http", "headers": headers}), os.fsdecode(b"s\xe9cret"))


@pytest.mark.parametrize("token", [None, "", " ", "\n"])
def test_no_token_lets_nobody_in(client, service, token) -> None:
    service.token = token
    for given in ("Bearer ", "Bearer", "Bearer None"):
        refused = client.post("/admin/rollback", headers={"authorization": given})
        assert refused.status_code == 401 and "no admin token" in refused.json()["error"]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-encoding": "gzip"}, gzip.compress(b'{"inputs": "w5"}', mtime=0), 422),
        ({"content-type": "text/csv"}, b"text\nw5\n", 422),
        ({"inference-header-content-length": "2"}, b"{}\x02\0\0\0w5", 415),
        ({}, b'{"inputs": NaN}', 422),
        ({}, b'{"inputs": "\\ud800"}', 422),
        ({}, b'{"\\ud800": "w5"}', 422),
    ],
)
def test_other_forms_than_json_are_refused(client, headers, body, status) -> None:
    for path in ("/predict", "/invocations", "/v2/models/runs/infer", "/feedback"):
        refused = client.post(path, content=body, headers=headers)
        assert refused.status_code == status and refused.json()["error_type"] == "Validation"


def test_json_of_any_name_is_read(client) -> None:
    body = json.dumps({"inputs": "w5"}).encode()
    for kind in ("", "application/json", "application/x-www-form-urlencoded", "text/plain"):
        headers = {"content-type": kind} if kind else {}
        assert client.post("/predict", content=body, headers=headers).status_code == 200
        refused = client.post("/predict", content=b"{", headers=headers)
        assert refused.status_code == 422 and refused.json()["error_type"] == "Validation"


def test_a_name_that_is_there_twice_is_refused(client) -> None:
    for body in (b'{"inputs": "w5", "inputs": "w6"}', b'{"inputs": {"text": ["w5"], "text": []}}'):
        refused = client.post("/invocations", content=body)
        assert refused.status_code == 422 and "is there twice" in refused.json()["error"]


def test_a_body_that_says_it_is_too_large_is_not_read(client) -> None:
    headers = {"content-length": "20001"}
    assert client.post("/predict", content=b"{}", headers=headers).status_code == 413


def test_the_version_of_a_model_is_its_round(client, service, april, may) -> None:
    (version,) = client.get("/v2/models/runs").json()["versions"]
    path, tensor = "/v2/models/runs/versions", {"name": "text", "shape": [1], "data": ["w5"]}
    payload = {"inputs": [tensor | {"datatype": "BYTES"}]}
    assert client.get(f"{path}/{version}").json() == client.get("/v2/models/runs").json()
    assert client.get(f"{path}/{version}/ready").status_code == 200
    answer = client.post(f"{path}/{version}/infer", json=payload).json()
    assert answer["model_version"] == version == april.id
    service.engine.exchange(may)
    gone = [client.get(f"{path}/{version}"), client.get(f"{path}/{version}/ready"),
            client.post(f"{path}/{version}/infer", json=payload)]  # fmt: skip
    for response in gone:
        assert response.status_code == 404 and may.id in response.json()["error"]


def test_where_the_backbone_is_is_told_to_nobody(client, folder) -> None:
    info = client.get("/info")
    assert str(folder) not in info.text and info.json()["model_id"] == "tiny"
