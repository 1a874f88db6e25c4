"""The application by environment variables, for several processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.serving.workers import application


@pytest.fixture(autouse=True)
def settings(folder, monkeypatch) -> None:
    values = {"RUN": str(folder / "runs"), "ROUND": "april", "DEVICE": "cpu", "MAX_TEXTS": "2"}
    for name, value in values.items():
        monkeypatch.setenv(f"BHPEFT_{name}", value)
    monkeypatch.setenv("BHPEFT_ADMIN_TOKEN", "secret")


def test_settings_come_from_the_environment(april, monkeypatch) -> None:
    monkeypatch.setenv("BHPEFT_MAX_SECONDS", "2.5")
    with TestClient(application()) as client:
        info = client.get("/info").json()
        assert info["round"] == april.id and info["max_client_batch_size"] == 2
        assert client.post("/predict", json={"inputs": ["w5"] * 3}).status_code == 413
        headers = {"authorization": "Bearer secret"}
        assert client.post("/admin/swap", headers=headers).status_code == 401


def test_names_of_hosts_and_nearest_texts_are_settings(monkeypatch) -> None:
    monkeypatch.setenv("BHPEFT_ALLOW_HOST", "a.example, Texts.example")
    monkeypatch.setenv("BHPEFT_NEAREST", "1")
    with TestClient(application()) as client:
        for host, status in (("texts.example:80", 200), ("b.example", 403)):
            assert client.get("/info", headers={"host": host}).status_code == status


def test_settings_that_cannot_work(monkeypatch) -> None:
    wrong = {"MAX_TEXTS": "many", "MAX_SECONDS": "x", "METHOD": "best", "DEVICE": "tpu", "RUN": ""}
    wrong |= {"MAX_TOKENS": "0", "MAX_TEXT": "3", "NEAREST": "yes"}  # out of range, and no limit
    for name, value in wrong.items():
        with monkeypatch.context() as patch:
            patch.setenv(f"BHPEFT_{name}", value)
            with pytest.raises(ConfigError, match=f"BHPEFT_{name}"):
                application()


def test_running_requests_of_killed_processes_are_forgotten(monkeypatch, tmp_path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine, killed, other = (
        tmp_path / name
        for name in (f"gauge_livesum_{os.getpid()}.db", f"gauge_livesum_{ended.pid}.db", "a_1.db")
    )
    for file in (mine, killed, other):
        file.touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    application()
    assert mine.exists() and other.exists() and not killed.exists()
