"""`bhpeft serve`: what it serves, how, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
from program import bhpeft, error, loaded

from bhpeft_pyro.cli.serve_command import serve
from bhpeft_pyro.serving.engine import Limits

pytest.importorskip("starlette")
CPU = ("--device", "cpu")


@pytest.fixture
def run_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What uvicorn is asked to run."""
    calls: list[Any] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **how: calls.append((app, how)))
    yield calls


def test_it_serves_a_round(run, run_by, monkeypatch) -> None:
    from starlette.testclient import TestClient

    monkeypatch.setenv("BHPEFT_ADMIN_TOKEN", "secret")
    said = bhpeft("serve", run, "--port", 9000, "--max-texts", 2, *CPU).stderr
    assert f"of {run}: exact forecasts" in said
    ((app, how),) = run_by
    assert (how["host"], how["port"]) == ("127.0.0.1", 9000)
    with TestClient(app) as client:
        assert client.post("/predict", json={"inputs": ["w5", "w6"]}).status_code == 200
        assert client.post("/predict", json={"inputs": ["w5"] * 3}).status_code == 413
        headers = {"authorization": "Bearer secret"}
        assert client.post("/admin/swap", headers=headers).status_code == 200


def test_other_names_of_this_machine_are_told_to_it(run, run_by) -> None:
    from starlette.testclient import TestClient

    bhpeft("serve", run, "--host", "texts.lan", "--allow-host", "a.example,b.example", *CPU, code=0)
    ((app, _),) = run_by
    with TestClient(app) as client:
        for host in ("texts.lan", "a.example", "b.example:8080"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        assert client.get("/health", headers={"host": "c.example"}).status_code == 403


def test_it_says_that_the_promise_is_for_another_method(copied, folder, run_by) -> None:
    texts = [f"w{5 + i % 2} w{11 + i % 30} w{9 + i // 30}" for i in range(100)]
    posterior = loaded(copied, folder).promise(
        {"text": texts, "label": ["bad", "good"] * 50}, max_share_to_people=0.5
    )
    for method, said in (("exact", False), ("student", True)):
        promised = replace(posterior.promised, method=method)
        posterior.replace(promised=promised).save(copied, overwrite=True)
        note = "is for --method student"
        assert (note in bhpeft("serve", copied, *CPU).stderr) == said


def test_what_is_refused(run, run_by, folder) -> None:
    assert "round: no round" in error("serve", run, "--round", "june", *CPU)
    assert "student" in error("serve", run, "--method", "student", *CPU)
    assert "no saved posterior" in error("serve", folder / "tiny", *CPU)
    assert not run_by


def test_limits_are_those_of_the_engine() -> None:
    options = signature(serve).parameters
    for name, value in vars(Limits()).items():
        assert options[f"max_{name}"].default == value
