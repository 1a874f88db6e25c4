"""A hub that does not answer is not asked again and again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import constants

from bhpeft_pyro.data.assets import hub_or_cache
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.model.backbone import load_backbone


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def closed(online: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a server that is gone."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{place.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    return address


@pytest.fixture
def there(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that answers, if only with an error."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # 501 to everything
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield constants.ENDPOINT
    server.shutdown()
    server.server_close()


def test_a_hub_that_is_gone_is_not_asked(closed):
    with hub_or_cache():
        assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    assert not constants.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(there):
    with hub_or_cache():
        assert not constants.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE


def test_its_client_does_not_try_again(closed, monkeypatch):
    """The retries wait for eight seconds each."""

    def wait(seconds: float) -> None:
        raise AssertionError(f"waits for {seconds} s")

    monkeypatch.setattr("time.sleep", wait)
    with pytest.raises(ConfigError, match="'minilm', 'mpnet', 'smollm2' come from PyPI"):
        load_backbone("owner/there-is-none")
