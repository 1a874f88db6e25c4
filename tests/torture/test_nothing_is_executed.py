"""Nothing of a file is executed: files that were made up, with checksums that are right, and texts
that mean something to a terminal, a spreadsheet, a browser or YAML.

    python -m pytest -m torture -s tests/torture/test_nothing_is_executed.py
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import counted, damaged, ending, load, predicted, sized
from program import ONE, bhpeft, error, read_csv, write_csv
from safetensors.torch import load_file, save_file
from saves import backbone_in, retensor

import bhpeft_pyro as bh
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.posterior.saving import FILE, packed, read
from bhpeft_pyro.testing import tiny_classifier, tiny_examples, tiny_model, tiny_tokenizer

CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")


def guard() -> None:
    """End this process if it starts another one, connects, unpickles or imports what a file names,
    or reads a file that one names."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        named = event in ("import", "open") and str(args[0]) in ("antigravity", "/etc/passwd")
        if event in CODE or event == "pickle.find_class" or named:
            print(f"executed: {event} {args}", file=sys.__stderr__)
            os._exit(99)

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def posteriors() -> tuple[bh.Posterior, bh.Posterior]:
    """Two that differ, the second a round later."""
    kinds = (bh.peft.LoRA(rank=1), bh.peft.Prefix(1))
    first = bh.fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=3, progress=False)
    return first, first.update(tiny_examples(12, seed=1))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in plain data with each of its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield value, key
        if isinstance(each, dict | list):
            yield from places(each)


HOSTILE: list[Any] = [
    *(None, True, -1, 0, 3, 10**9, 2**63, 10**30, 0.5, -1e300, float("nan"), float("inf")),
    *("", "x", "x" * 10**5, "../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "LoRA", "auto"),
    *("antigravity:fly", "os:system", "/etc/passwd"),
    *([], {}, [[]], [1, "a"], {"a": None}, {"class": "Head"}, [[[[[]]]]]),
]


def crafted(chance: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """One or two values replaced, removed, renamed or put elsewhere."""
    content = copy.deepcopy(content)
    for _ in range(chance.choice([1, 1, 2])):
        # As likely in a part of the model as in one of many reports.
        inside = content[chance.choice([*content])]
        some = inside if isinstance(inside, dict | list) and inside else content
        holder, key = chance.choice([*places(some)])
        match chance.choice(["replace", "replace", "replace", "remove", "rename", "exchange"]):
            case "replace":
                holder[key] = copy.deepcopy(chance.choice(HOSTILE))
            case "remove":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder["other"] = holder.pop(key)
            case _:
                holder[key] = copy.deepcopy(chance.choice([h[k] for h, k in places(content)]))
    return content


@sized(100, 3000)
def test_crafted_headers(
    runs: int, posteriors: tuple[bh.Posterior, bh.Posterior], tmp_path: Path
) -> None:
    """Their checksums are right, so that all that is read is in doubt."""
    folder = posteriors[1].save(tmp_path / "run")
    plain, tensors = read(folder)

    def attempt(chance: random.Random) -> str:
        made = json.loads(json.dumps(crafted(chance, plain)))
        (folder / FILE).write_bytes(packed(made, tensors))
        return ending(lambda: predicted(load(folder)))

    counted("crafted headers", runs, tmp_path, attempt, guard)


def altered(chance: random.Random, value: torch.Tensor) -> torch.Tensor:
    """A tensor of another dtype or shape, or with other numbers."""
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        *(torch.Tensor.half, torch.Tensor.double, torch.Tensor.long, torch.Tensor.flatten),
        lambda value: value.float() * float("nan"),
        lambda value: value.float() / 0,
        lambda value: value[..., 1:] if value.ndim else value[None],
        lambda value: value.new_zeros(()),
    ]
    return chance.choice(changes)(value).contiguous().clone()


@sized(40, 1000)
def test_crafted_tensors(
    runs: int, posteriors: tuple[bh.Posterior, bh.Posterior], tmp_path: Path
) -> None:
    """Their checksums are right, too."""
    options: dict[str, Any] = {"components": 2, "max_steps": 2, "progress": False}
    wholes = [posteriors[1].save(tmp_path / "normal")]
    mixture = bh.fit(tiny_model(), "laplace", tiny_examples(), **options)
    wholes.append(mixture.save(tmp_path / "laplace"))

    def attempt(chance: random.Random) -> str:
        folder = Path(shutil.copytree(chance.choice(wholes), tmp_path / "run"))
        one = chance.choice(sorted(read(folder)[1]))
        retensor(folder, lambda name: name == one, lambda value: altered(chance, value))
        found = ending(lambda: predicted(load(folder)))
        shutil.rmtree(folder)
        return found

    counted("crafted tensors", runs, tmp_path, attempt, guard)


def damage(chance: random.Random, file: Path) -> None:
    """Other bytes, other values in JSON, or other tensors."""
    data = file.read_bytes()
    if chance.random() < 0.3:
        file.write_bytes(damaged(chance, data))
    elif file.suffix == ".json":
        content = json.loads(data)
        made = crafted(chance, content)
        if "num_hidden_layers" in content:  # as many as it says are made, however long it takes
            made["num_hidden_layers"] = content["num_hidden_layers"]
        file.write_text(json.dumps(chance.choice([made, made, made, *HOSTILE])))
    else:
        tensors = load_file(file)
        one = chance.choice(sorted(tensors))
        save_file(tensors | {one: altered(chance, tensors[one])}, file)


def of_backbone(folder: Path) -> torch.Tensor:
    backbone, tokenizer = load_backbone(str(folder), "cpu")
    network = bh.RandomPEFT(backbone, (), bh.Head(2), tokenizer)
    options: dict[str, Any] = {"max_steps": 1, "progress": False}
    return predicted(bh.fit(bh.Model(network), "normal", tiny_examples(), **options))


def of_adapter(folder: Path) -> torch.Tensor:
    return predicted(bh.from_peft(folder, backbone=tiny_classifier()))


@pytest.mark.parametrize("read", [of_backbone, of_adapter])
@sized(20, 500)
def test_crafted_backbones_and_adapters(
    runs: int, read: Callable[[Path], torch.Tensor], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    if read is of_backbone:
        backbone_in(whole)
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
        peft.get_peft_model(tiny_classifier(), config).save_pretrained(whole)
        tiny_tokenizer().save_pretrained(whole)
    names = sorted(p.name for p in whole.iterdir() if p.suffix in (".json", ".safetensors"))

    def attempt(chance: random.Random) -> str:
        folder = Path(shutil.copytree(whole, tmp_path / "run"))
        damage(chance, folder / chance.choice(names))
        found = ending(lambda: read(folder))
        shutil.rmtree(folder)
        return found

    counted(f"damaged: {read.__name__}", runs, tmp_path, attempt, guard)


TEXTS = ["w5 =1+1", "=cmd|' /C calc'!A0", "@SUM(w5)", "\x1b[31m w6", "<script>alert(1)</script>"]


def test_texts_of_a_file_are_texts_everywhere(tmp_path: Path) -> None:
    backbone_in(tmp_path / "tiny")
    train = write_csv(tmp_path / "t.csv", text=TEXTS * 3, label=["=a", "<b>", "c"] * 5)
    fit = ("fit", train, "--out", tmp_path / "run", "--backbone", tmp_path / "tiny", *ONE)
    said = bhpeft(*fit, "--validation", 0).output
    new = write_csv(tmp_path / "n.csv", text=TEXTS)
    said += bhpeft("predict", tmp_path / "run", new, "--out", tmp_path / "p.csv").output
    assert "\x1b[31m" not in said
    rows = read_csv(tmp_path / "p.csv")
    assert [row["text"] for row in rows[1:3]] == [f"'{text}" for text in TEXTS[1:3]]
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "@"))]
    config, mark = tmp_path / "c.yaml", tmp_path / "executed"
    config.write_text(f"seed: !!python/object/apply:os.system ['touch {mark}']\n")
    assert "c.yaml" in error(*fit, "--overwrite", "--config", config)
    assert not mark.exists()
