"""Saves that somebody made up: nothing but the files of a posterior is read, and nothing runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from program import error, write_csv
from saves import backbone_in, load, retensor, rewrite
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BHPEFTError, ConfigError, SaveError
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model
from bhpeft_pyro.training.report import FitReport

Content = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = (bh.peft.LoRA(rank=2), bh.peft.Adapter(2), bh.peft.Prefix(2))
    posterior = bh.fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=2, progress=False)
    return posterior.save(tmp_path_factory.mktemp("saved") / "whole")


CRAFTED: list[tuple[Callable[[Content], Any], str]] = [
    # Other files as its tensors.
    (lambda c: c["tensors"].update(file="/etc/passwd"), "'/etc/passwd' as its tensors"),
    (lambda c: c["tensors"].update(file="../whole/" + c["tensors"]["file"]), "as its tensors"),
    (lambda c: c["tensors"].update(file=3), "as its tensors"),
    (lambda c: c["tensors"].update(bytes=7), "cut off or altered"),
    (lambda c: c.update(tensors=[]), "unknown parts"),
    # Other classes of the package than those that may be there.
    (lambda c: c["kinds"][0].update({"class": "Attachment"}), "kinds: 'Attachment' is unknown"),
    (lambda c: c["likelihood"].update({"class": "Function"}), "likelihood: 'Function' is unknown"),
    # Code of others.
    (lambda c: c["likelihood"].update({"class": "os:system"}), "'os:system'; pass likelihood="),
    (lambda c: c.update(guide="os:system"), "'os:system'; pass guide="),
    (lambda c: c.update(prior={"kind": "custom", "path": "os:system"}), "'os:system'; pass prior="),
    # Numbers for which it has no weights.
    (lambda c: c["head"].update(outputs=10**9), r"Head has outputs=1000000000, .* tensors"),
    (lambda c: c["kinds"][0].update(rank=10**10), "LoRA has rank=10000000000"),
    (lambda c: c["kinds"][1].update(size=10**9), "Adapter has size"),
    (lambda c: c["kinds"][2].update(length=10**9), "Prefix has length"),
    (
        lambda c: c.update(guide="pyro", guide_options={"family": "lowrank", "rank": 10**9}),
        r"guide 'pyro' has \d+ parameters",
    ),
    # Reports of other types.
    (lambda c: c["lineage"][0].update(steps="many"), r"steps='many'; expected int"),
    (lambda c: c["lineage"][0].update(history=[{"loss": []}]), "history="),
    (lambda c: c["lineage"][0].update(metrics=[1]), "metrics="),
    (lambda c: c["lineage"][0].update(id=None), "id=None"),
    (lambda c: c["lineage"][0].update(options=None), "unknown parts"),
    (lambda c: c.update(lineage=5), "unknown parts"),
    (lambda c: c["lineage"][0].update(parent="../whole"), "as a round; expected an id"),
    (lambda c: c.update(backbone=[]), "unknown parts"),
]


@pytest.mark.parametrize(("change", "message"), CRAFTED)
def test_what_does_not_fit_is_refused(
    change: Callable[[Content], Any], message: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    rewrite(folder, change)
    with pytest.raises(SaveError, match=message):
        load(folder)


@pytest.mark.parametrize("what", ["likelihood", "guide", "prior"])
def test_code_that_a_file_names_is_never_imported(what: str, whole: Path, tmp_path: Path) -> None:
    folder, path = Path(shutil.copytree(whole, tmp_path / "run")), "antigravity:fly"
    crafted = {"likelihood": {"class": path}, "guide": path}
    crafted["prior"] = {"kind": "custom", "path": path}
    rewrite(folder, lambda content: content.update({what: crafted[what]}))
    ran: list[object] = []
    for given in (None, ran.append):
        with pytest.raises(SaveError, match=f"{what}: .*'{path}'"):
            load(folder, **{what: given})
    assert not ran and "antigravity" not in sys.modules


def test_tensors_of_another_kind_are_refused(whole: Path, tmp_path: Path) -> None:
    """With a checksum that is right they were loaded, and the first prediction failed."""
    changes: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
        ("guide.", lambda value: value * float("nan"), "is not finite"),
        ("network.coordinates.lora", Tensor.half, "is torch.float16; expected torch.float32"),
        ("network.coordinates.lora/query/B/left", Tensor.flatten, "size mismatch"),
    ]
    for part, change, message in changes:
        folder = Path(shutil.copytree(whole, tmp_path / message))
        retensor(folder, lambda name, part=part: name.startswith(part), change)
        with pytest.raises(SaveError, match=message):
            load(folder)
    laplace = bh.fit(tiny_model(()), "laplace", tiny_examples(), components=1, max_steps=2)
    folder = laplace.save(tmp_path / "laplace")
    retensor(folder, lambda name: name == "guide.scale", lambda value: value[1:].clone())
    with pytest.raises(SaveError, match="size mismatch for scale"):
        load(folder)


def test_a_deep_index_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for depth in (50, 500, 100_000):
        nested = "[" * depth + "]" * depth
        digest = hashlib.sha256(nested.encode()).hexdigest()
        (folder / "posterior.json").write_text(f'{{"sha256": "{digest}", "content": {nested}}}')
        with pytest.raises(SaveError, match="is not a saved posterior"):
            load(folder)
    shutil.copy(whole / "posterior.json", folder)
    rewrite(folder, lambda content: content.update(note=json.loads("[" * 90 + "]" * 90)))
    with pytest.raises(SaveError, match="too deep"):
        load(folder)


@pytest.mark.parametrize("name", ["posterior.json", "*.safetensors"])
def test_only_regular_files_are_read(name: str, whole: Path, tmp_path: Path) -> None:
    """A FIFO waited for a writer; a device never ended."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (file,) = folder.glob(name)
    for make in (
        lambda: os.mkfifo(file),
        lambda: file.symlink_to("/dev/zero"),
        lambda: file.mkdir(),
    ):
        file.rmdir() if file.is_dir() else file.unlink()
        make()
        with pytest.raises(SaveError, match="is not a regular file"):
            load(folder)


def test_a_backbone_is_a_file_or_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(ConfigError, match=r"backbone: .* neither a file nor a folder"):
            load_backbone(name, "cpu")
    for name in ("~nobody-of-this-name/model", "a\0b"):
        with pytest.raises(BHPEFTError, match="backbone"):
            load_backbone(name, "cpu")


def _set(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # not a pickle at all


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (_set(num_attention_heads=0), "the configuration or the weights of '.*' are damaged"),
    (_set(intermediate_size=3), "damaged .*ignore_mismatched_sizes"),
    (_set(vocab_size={}), "damaged"),
    (lambda folder: (folder / "config.json").write_text("null"), "damaged"),
    (_pickled, "damaged"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "tokenizer: none can be"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "tokenizer: none can be"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'), "tokenizer: none can"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_backbone_is_refused(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    folder = backbone_in(tmp_path / "tiny")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load_backbone(str(folder), "cpu")


def test_damaged_backbones_end_the_program_in_a_line(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", text=["w5", "w6"] * 3, label=["a", "b"] * 3)
    folder = backbone_in(tmp_path / "tiny")
    (folder / "cut.gguf").write_bytes(b"GGUF\3\0")
    fit = ("fit", table, "--out", tmp_path / "run", "--device", "cpu", "--backbone")
    assert "the weights of" in error(*fit, folder / "cut.gguf")
    _set(num_attention_heads=0)(folder)
    assert "are damaged" in error(*fit, folder)


def test_code_beside_a_tokenizer_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asked on the terminal whether to run it, and ran it on "y"."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    backbone = tiny_backbone()
    backbone.config._name_or_path = str(tmp_path)
    network = bh.RandomPEFT(backbone, (), bh.Head(2))
    with suppress(Exception):  # there is no tokenizer in the folder
        _ = network.tokenizer
    assert not (tmp_path / "was-run").exists()


def test_a_report_says_which_field_is_of_another_type() -> None:
    plain = asdict(FitReport(4, "", bh.FitOptions()))
    assert FitReport.from_json(plain).examples == 4
    with pytest.raises(TypeError, match=r"keep=\{'a': None\}; expected float \| dict"):
        FitReport.from_json(plain | {"keep": {"a": None}})
