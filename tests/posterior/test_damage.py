"""Saves that were damaged or made up: refused in words, nothing else is read, and nothing runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
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
from bhpeft_pyro.posterior.saving import FILE, digest_of
from bhpeft_pyro.testing import tiny_examples, tiny_model
from bhpeft_pyro.training.report import FitReport

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = (bh.peft.LoRA(rank=2), bh.peft.Adapter(2), bh.peft.Prefix(2))
    posterior = bh.fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=2, progress=False)
    return posterior.save(tmp_path_factory.mktemp("saved") / "whole")


def file(change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes."""
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def instead(make: Callable[[Path], Any]) -> Damage:
    """Something else in place of the file."""

    def damage(folder: Path) -> None:
        (folder / FILE).unlink()
        make(folder / FILE)

    return damage


def header(text: str, length: int | None = None) -> Damage:
    """A file of nothing but a header."""
    size = len(text) if length is None else length
    return file(lambda _: size.to_bytes(8, "little") + text.encode())


def plain(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Other plain data, with checksums that are right."""
    return lambda folder: rewrite(folder, change)


def tensors(part: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """Other tensors, with checksums that are right."""
    return lambda folder: retensor(folder, lambda name: name.startswith(part), change)


def component(**fields: Any) -> Damage:
    return plain(lambda c: c["components"][0].update(fields))


def report(**fields: Any) -> Damage:
    return plain(lambda c: c["lineage"][0].update(fields))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if at else data


DEEP = {depth: "[" * depth + "]" * depth for depth in (500, 100_000)}
FLAT = json.dumps({"__metadata__": {"posterior": "[]", "tensors": ""}})
WITH_A_CHECKSUM = FLAT.replace('""}', f'"", "header": "{digest_of(json.loads(FLAT))}"}}')
PYRO = {"guide": "pyro", "guide_options": {"family": "lowrank", "rank": 10**9}}

DAMAGES: dict[str, tuple[Damage, str]] = {
    # Bytes.
    "cut off": (file(lambda data: data[:-7]), "was cut off or altered"),
    "cut off in the header": (file(lambda data: data[:99]), "cut off .* its header is not whole"),
    "empty": (file(lambda _: b""), "cut off or is not a saved posterior"),
    "one bit of a weight": (file(lambda data: flipped(data, len(data) - 3)), "cut off or altered"),
    "one number": (file(lambda data: data.replace(b'temperature\\": 1', b'temperature\\": 2')),
                   "was altered"),
    "the name of a tensor": (file(lambda data: data.replace(b"guide.loc.head", b"guide.loc.heat")),
                             "was altered"),
    "more at the end": (file(lambda data: data + b"0"), "was cut off or altered"),
    "no safetensors file": (file(lambda _: b"\xff\xfe\x00 and text"), "not a saved posterior"),
    "another safetensors file": (header("{}"), "not a saved posterior"),
    "a list": (header("[1, 2]"), "not a saved posterior"),
    "metadata of another type": (header('{"__metadata__": "posterior"}'), "not a saved posterior"),
    "no object": (header(WITH_A_CHECKSUM), "is no object"),
    "a huge header": (header("{}", 2**63), "its header is not whole"),
    "a deep header": (header(DEEP[500]), "not a saved posterior"),
    "a header too deep to be read": (header(DEEP[100_000]), "not a saved posterior"),
    "gone": (instead(lambda path: None), "no saved posterior"),
    "a folder": (instead(Path.mkdir), "Is a directory"),
    # Formats, and parts that are missing or unknown.
    "a newer format": (
        plain(lambda c: c.update(format=99, written_by={"bhpeft_pyro": "9.8.7"})),
        r"format 99, expected \d; bhpeft_pyro 9\.8\.7 wrote it and can read it",
    ),
    "no format": (plain(lambda c: c.pop("format")), "format None"),
    "no lineage": (plain(lambda c: c.pop("lineage")), "lineage"),
    "an unknown option": (plain(lambda c: c["head"].update(pool="max")), "pool"),
    "an unknown guide": (component(guide="horoscope"), "horoscope"),
    "an unknown prior": (plain(lambda c: c["priors"][0].update(kind="oracle")), "oracle"),
    "a list for a dict": (plain(lambda c: c.update(backbone=[])), "unknown parts"),
    # Other classes of the package than those that may be there, and code of others.
    "another head": (plain(lambda c: c["head"].update({"class": "Site"})), "'Site'"),
    "another kind": (
        plain(lambda c: c["kinds"][0].update({"class": "Attachment"})),
        "kinds: 'Attachment' is unknown",
    ),
    "another likelihood": (
        plain(lambda c: c["likelihood"].update({"class": "Function"})),
        "likelihood: 'Function' is unknown",
    ),
    # Numbers for which it has no weights.
    "outputs": (plain(lambda c: c["head"].update(outputs=10**9)), r"Head has outputs=1000000000"),
    "rank": (plain(lambda c: c["kinds"][0].update(rank=10**10)), "LoRA has rank=10000000000"),
    "size": (plain(lambda c: c["kinds"][1].update(size=10**9)), "Adapter has size"),
    "length": (plain(lambda c: c["kinds"][2].update(length=10**9)), "Prefix has length"),
    "parameters": (component(**PYRO), r"guide 'pyro' has \d+ parameters"),
    # Reports of other types.
    "steps": (report(steps="many"), "steps="),
    "history": (report(history=[{"loss": []}]), "history"),
    "metrics": (report(metrics=[1]), "metrics="),
    "id": (report(id=None), "id=None"),
    "options": (report(options=None), "unknown parts"),
    "a round elsewhere": (report(parent="../whole"), "as a round; expected an id"),
    "no reports": (plain(lambda c: c.update(lineage=5)), "unknown parts"),
    # Tensors: with checksums that are right they were loaded, and the first prediction failed.
    "not finite": (tensors("0.guide.", lambda value: value * float("nan")), "is not finite"),
    "another dtype": (
        tensors("network.coordinates.lora", Tensor.half),
        "is torch.float16; expected torch.float32",
    ),
    "another shape": (tensors("network.coordinates.lora/query/B/left", Tensor.flatten), "size mis"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=[*DAMAGES])
def test_what_is_damaged_or_made_up_is_refused(
    damage: Damage, message: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    damage(folder)
    with pytest.raises(SaveError, match=message):
        load(folder)


def test_a_covariance_of_another_size_is_refused(tmp_path: Path) -> None:
    laplace = bh.fit(tiny_model(()), "laplace", tiny_examples(), components=1, max_steps=2)
    folder = laplace.save(tmp_path)
    tensors("0.guide.rest", lambda value: value[1:].clone())(folder)
    with pytest.raises(SaveError, match="size mismatch for rest"):
        load(folder)


@pytest.mark.parametrize("what", ["likelihood", "guide", "prior"])
def test_code_that_a_file_names_is_never_imported(what: str, whole: Path, tmp_path: Path) -> None:
    folder, path = Path(shutil.copytree(whole, tmp_path / "run")), "antigravity:fly"
    parts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "likelihood": lambda content: content["likelihood"].update({"class": path}),
        "guide": lambda content: content["components"][0].update(guide=path),
        "prior": lambda content: content.update(priors=[{"kind": "custom", "path": path}]),
    }
    rewrite(folder, parts[what])
    ran: list[object] = []
    for given in (None, ran.append):
        with pytest.raises(SaveError, match=f"{what}: .*'{path}'"):
            load(folder, **{what: given})
    assert not ran and "antigravity" not in sys.modules


def test_a_backbone_is_a_file_or_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(ConfigError, match=r"backbone: .* neither a file nor a folder"):
            load_backbone(name, "cpu")
    for name in ("~nobody-of-this-name/model", "a\0b"):
        with pytest.raises(BHPEFTError, match="backbone"):
            load_backbone(name, "cpu")


def _set(**values: Any) -> Damage:
    def change(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))

    return change


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # not a pickle at all


def _cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


BACKBONES: list[tuple[Damage, str]] = [
    (_set(num_attention_heads=0), "the configuration or the weights of '.*' are damaged"),
    (_set(intermediate_size=3), "damaged .*ignore_mismatched_sizes"),
    (_set(vocab_size={}), "damaged"),
    (lambda folder: (folder / "config.json").write_text("null"), "damaged"),
    (_pickled, "damaged"),
    (_cut_off, "not a folder with a model"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "tokenizer: none can be"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "tokenizer: none can be"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'), "tokenizer: none can"),
]


@pytest.mark.parametrize(("damage", "message"), BACKBONES)
def test_a_damaged_backbone_is_refused(damage: Damage, message: str, tmp_path: Path) -> None:
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


def test_a_report_says_which_field_is_of_another_type() -> None:
    plain = asdict(FitReport(4, "", bh.FitOptions()))
    assert FitReport.from_json(plain).examples == 4
    with pytest.raises(ConfigError, match=r"^keep"):
        FitReport.from_json(plain | {"keep": {"a": None}})
