"""Saves that were damaged or made up: refused by name, nothing else is read, and nothing runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from saves import backbone_in, load, retensor, rewrite
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.decisions.watching import watched
from bhpeft_pyro.errors import BHPEFTError, ConfigError, SaveError
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.posterior.saving import FILE
from bhpeft_pyro.testing import tiny_examples, tiny_model

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = (bh.peft.LoRA(rank=2), bh.peft.Adapter(2), bh.peft.Prefix(2))
    posterior = bh.fit(tiny_model(kinds), "normal", tiny_examples(40), max_steps=2, progress=False)
    posterior = posterior.distill(tiny_examples(60, seed=1), epochs=1, progress=False)
    posterior = posterior.promise(tiny_examples(100, seed=2), error=0.4)
    return posterior.save(tmp_path_factory.mktemp("saved") / "whole")


def file(change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes."""
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def exchanged(old: bytes, new: bytes) -> Damage:
    """One part of the bytes for another of its size."""

    def change(data: bytes) -> bytes:
        assert old in data and len(old) == len(new)
        return data.replace(old, new)

    return file(change)


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
    """Other plain data, with digests that are right."""
    return lambda folder: rewrite(folder, change)


def tensors(part: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """Other tensors, with digests that are right."""
    return lambda folder: retensor(folder, lambda name: name.startswith(part), change)


def of(part: str, **fields: Any) -> Damage:
    """Other fields of a part."""
    return plain(lambda content: content[part].update(fields))


def guide(**fields: Any) -> Damage:
    return plain(lambda content: content["guides"][0].update(fields))


def kind(number: int, **fields: Any) -> Damage:
    return plain(lambda content: content["kinds"]["of"][number].update(fields))


def report(**fields: Any) -> Damage:
    return plain(lambda content: content["lineage"][0].update(fields))


def without(*path: str) -> Damage:
    """Without a part, or a field of one."""

    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return plain(change)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if at else data


def huge(labels: Tensor) -> Tensor:
    return labels * 0 + 2**40  # of which 8 TiB were asked for


def two(labels: Tensor) -> Tensor:
    return labels * 0 + 2


def negative(labels: Tensor) -> Tensor:
    return labels - 2


def narrower(states: Tensor) -> Tensor:
    return states[:, 1:].clone()


DEEP = {depth: "[" * depth + "]" * depth for depth in (500, 100_000)}
PYRO = {"$": "PyroGuide", "options": {"family": "lowrank", "rank": 10**9}}
NAN, INF = float("nan"), float("inf")
PARTS = ("columns", "head", "likelihood", "priors", "lineage", "guides", "network", "student")
NUMBERS = ("points", "coefficients", "center", "scale", "length")  # of a student

OWN = {"$": "own", "path": "builtins:print", "words": "print"}
DAMAGES: dict[str, tuple[Damage, str]] = {
    # Bytes: what the file is, or what of it differs from its digest.
    "cut off": (file(lambda data: data[:-7]), "cut off"),
    "cut off in the header": (file(lambda data: data[:99]), "cut off .* header"),
    "empty": (file(lambda _: b""), "cut off"),
    "one bit of a weight": (file(lambda data: flipped(data, len(data) - 3)), "tensors"),
    "one number": (exchanged(b'temperature\\": 1', b'temperature\\": 2'), "digest"),
    "a tensor's name": (exchanged(b'loc.head/bias":', b'loc.head/biat":'), "tensors"),
    "a tensor's type": (exchanged(b'"I64"', b'"F64"'), "tensors"),
    "more at the end": (file(lambda data: data + b"0"), "cut off"),
    "no safetensors file": (file(lambda _: b"\xff\xfe\x00 and text"), "cut off"),
    "another safetensors file": (header("{}"), "not a saved posterior"),
    "a list": (header("[1, 2]"), "not a saved posterior"),
    "no object": (header('{"__metadata__": {"posterior": "[]"}}'), "not a saved posterior"),
    "a huge header": (header("{}", 2**63), "header"),
    "a deep header": (header(DEEP[500]), "not a saved posterior"),
    "a header too deep to be read": (header(DEEP[100_000]), "not a saved posterior"),
    "gone": (instead(lambda path: None), "no saved posterior"),
    "a folder": (instead(Path.mkdir), "Is a directory"),
    # Formats, and parts that are missing or unknown.
    "an older format": (plain(lambda c: c.update(format=4, written_by={"bhpeft_pyro": "0.0.9"})),
                        r"format 4 of bhpeft_pyro 0\.0\.9; .*fit again"),
    "no format": (plain(lambda c: c.update(format=None)), "format None"),
    **{f"no {part}": (without(part), part) for part in PARTS},
    "an unknown option": (of("head", pool="max"), "head .*pool"),
    "a list for a dict": (plain(lambda c: c.update(backbone=[])), "network"),
    "a head for a likelihood": (plain(lambda c: c.update(likelihood=c["head"])), "likelihood"),
    "a likelihood for a head": (plain(lambda c: c.update(head=c["likelihood"])), "head"),
    "a report for a guide": (plain(lambda c: c.update(guides=c["lineage"])), "guides"),
    "a head for a guide": (guide(**{"$": "Head", "options": {}}), "guides"),
    "two guides": (plain(lambda c: c["guides"].append(c["guides"][0])), "guides"),
    # Other classes than those that may be there.
    "an unknown guide": (guide(**{"$": "Horoscope"}), r"guides\.0: 'Horoscope'"),
    "an unknown prior": (plain(lambda c: c["priors"][0].update({"$": "Oracle"})), r"priors\.0"),
    "another head": (of("head", **{"$": "Site"}), "head: 'Site'"),
    "another kind": (kind(0, **{"$": "Attachment"}), r"kinds\.of\.0|kinds\.0: 'Attachment'"),
    "another likelihood": (of("likelihood", **{"$": "Outputs"}), "likelihood: 'Outputs'"),
    "a class that is none": (of("head", **{"$": ["Head"]}), "head"),
    # Numbers for which it has no weights.
    "outputs": (of("head", outputs=10**9), "Head has outputs="),
    "rank": (kind(0, rank=10**10), "LoRA has rank="),
    "size": (kind(1, size=10**9), "Adapter has size="),
    "length": (kind(2, length=10**9), "Prefix has length="),
    "parameters": (guide(**PYRO), r"guides\.0"),
    # Reports of other types.
    "steps": (report(steps="many"), "lineage .*steps="),
    "history": (report(history=[{"loss": []}]), "lineage .*history"),
    "metrics": (report(metrics=[1]), "lineage .*metrics="),
    "id": (report(id=None), "lineage .*id="),
    "options": (report(options=None), "lineage .*options="),
    "a seed": (report(split=2**70), "lineage .*split="),
    "a round elsewhere": (report(parent="../whole"), "as a round"),
    "no reports": (plain(lambda c: c.update(lineage=5)), "lineage"),
    "another object": (plain(lambda c: c["lineage"].append(c["head"])), "lineage"),
    # Tensors: with digests that are right they were loaded, and the first prediction failed.
    "not finite": (tensors("guides.0.", lambda value: value * NAN), "guides.* is not finite"),
    "another dtype": (tensors("network.coordinates.lora", Tensor.half), "network"),
    "another shape": (tensors("network.coordinates.lora/query/B/left", Tensor.flatten), "network"),
    "rows": (tensors("learnt_rows", Tensor.float), "learnt_rows"),
    # What is beside the components.
    **{f"novelty, count={v}": (of("novelty", count=v), "novelty .*count=")
       for v in (NAN, INF, -1, None)},
    **{f"novelty, {name} {way.__name__}": (tensors(f"novelty.{name}", way), "novelty")
       for name in ("middle", "last") for way in (Tensor.double, narrower)},
    **{f"promise, {name}={v}": (of("promised", **{name: v}), f"promised .*{name}=")
       for name, v in {"error": 0, "threshold": NAN, "rows": 0, "answered": -1}.items()},
    "promise, answered": (of("promised", answered=101), "promised .*of 101 of 100 rows"),
    "promise, wrong": (of("promised", wrong=101), "promised .*101 of .* of 100 rows"),
    **{f"promise, {way.__name__}": (tensors("promised.calibration.label", way), "promised .*labels")
       for way in (huge, two, negative, Tensor.double)},
    **{f"promise, no {name}": (without("promised", "calibration", name), f"promised .*{name}")
       for name in ("chance", "label", "miss")},
    "student, report": (of("student", report=5), "student .*report="),
    "student, not finite": (tensors("student.weights.head.bias", lambda value: value * NAN),
                            "student.weights.head.bias' is not finite"),
    "student, shorter": (tensors("student.weights.head.bias", lambda value: value[:1].clone()),
                         "path: student"),
    **{f"student, {name} {way.__name__}": (tensors(f"student.uncertainty.{name}", way),
                                           f"student .*{name}")
       for name in NUMBERS for way in (Tensor.double, Tensor.bool)},
    **{f"{part}, no {name}": (without(part, name), f"{part} .*{name}")
       for part, name in {"novelty": "count", "promised": "rows", "student": "report"}.items()},
    # Code of one's own is nowhere but in priors, likelihood and guide.
    "head, own code": (of("head", outputs=OWN), "head"),
    "columns, own code": (of("columns", text=OWN), "columns"),
    "novelty, own code": (plain(lambda content: content.update(novelty=OWN)), "novelty"),
    "guide, own code": (guide(options={"init_scale": OWN}), "guides"),
    "report, own code": (report(name=OWN), "lineage"),
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
    tensors("guides.0.state.rest", lambda value: value[1:].clone())(folder)
    with pytest.raises(SaveError, match=r"guides\.0"):
        load(folder)


@pytest.mark.parametrize("what", ["likelihood", "guide", "prior"])
def test_code_that_a_file_names_is_never_imported(what: str, whole: Path, tmp_path: Path) -> None:
    folder, path = Path(shutil.copytree(whole, tmp_path / "run")), "antigravity:fly"
    own: dict[str, Any] = {"$": "own", "path": path}
    parts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "likelihood": lambda content: content.update(likelihood={**own, "options": {}}),
        "guide": lambda content: content["guides"][0].update(own),
        "prior": lambda content: content.update(priors=[{**own, "words": "fly"}]),
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
    (lambda folder: (folder / "config.json").write_text("null"), "damaged"),
    (_pickled, "damaged"),
    (_cut_off, "not a folder with a model"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "tokenizer: none can be"),
]


@pytest.mark.parametrize(("damage", "message"), BACKBONES)
def test_a_damaged_backbone_is_refused(damage: Damage, message: str, tmp_path: Path) -> None:
    folder = backbone_in(tmp_path / "tiny")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load_backbone(str(folder), "cpu")


NOTED = {
    "promise/answered": 10.0,
    "promise/wrong": 1.0,
    "promise/error": 0.4,
    "promise/broken": 0.0,
}


@pytest.mark.parametrize("name", ["promise/answered", "promise/wrong", "promise/broken"])
@pytest.mark.parametrize("value", [None, NAN, -1.0])
def test_a_report_whose_count_of_a_promise_is_none(
    whole: Path, name: str, value: float | None
) -> None:
    posterior = load(whole)
    forecast = posterior.predict(tiny_examples(30, seed=5))
    metrics = {key: number for key, number in (NOTED | {name: value}).items() if number is not None}
    report = replace(posterior.report, metrics=metrics)
    with pytest.raises(SaveError, match=f"round {report.id}: its counts"):
        watched(forecast, [report])
    assert watched(forecast, [replace(report, metrics=NOTED)])["promise/broken"] == 0
