"""Saves under stress. Each run counts what came out, and accepts three things only: the right
posterior, the one before, or an error of this package.

The small runs are in the suite; for the large ones, with their counts:

    python -m pytest -m torture -s tests/torture/test_saves.py
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from components import same
from forks import in_a_child, killed_at_line, start, wait
from outcomes import ERROR, OLD, RIGHT, load, report, sized
from safetensors.torch import load_file, save_file
from saves import backbone_in, retensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BHPEFTError, is_out_of_memory
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.posterior.saving import FILE, packed, read
from bhpeft_pyro.testing import tiny_classifier, tiny_examples, tiny_model, tiny_tokenizer

TEXTS = ["w5 w20", "w6 w21"]


@pytest.fixture(scope="module")
def posteriors() -> tuple[bh.Posterior, bh.Posterior]:
    """Two that differ, the second a round later."""
    kinds = (bh.peft.LoRA(rank=1), bh.peft.Prefix(1))
    first = bh.fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=3, progress=False)
    return first, first.update(tiny_examples(12, seed=1))


def predicted(posterior: bh.Posterior) -> torch.Tensor:
    return posterior.predict(TEXTS, samples=0).probabilities


def which(loaded: bh.Posterior, posteriors: tuple[bh.Posterior, ...]) -> int:
    """Which one was loaded, whole: its weights and its reports."""
    for number, each in enumerate(posteriors):
        if loaded.lineage == each.lineage and same(each, loaded):
            return number
    raise AssertionError("what was loaded is none of those that were saved")


def check_usable(folder: Path, posterior: bh.Posterior) -> None:
    """The next save works, and clears what those that were killed left."""
    posterior.save(folder, overwrite=True)
    names = [path.name for path in folder.iterdir()]
    assert names == [FILE], names


@sized(30, 1000)
def test_a_save_is_killed_at_random_moments(
    runs: int, posteriors: tuple[bh.Posterior, bh.Posterior], tmp_path: Path
) -> None:
    chance, counts = random.Random(0), Counter[str]()
    posteriors[0].save(tmp_path)

    def saves() -> None:
        while True:
            for each in posteriors[::-1]:
                each.save(tmp_path, overwrite=True)

    for _ in range(runs):
        child = start(saves)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        counts[(OLD, RIGHT)[which(load(tmp_path), posteriors)]] += 1
    check_usable(tmp_path, posteriors[0])
    report("killed at a random moment", counts)


@pytest.mark.parametrize("first", [True, False])
@sized(7, 1)
def test_a_save_is_killed_before_each_line(
    runs: int, first: bool, posteriors: tuple[bh.Posterior, bh.Posterior], tmp_path: Path
) -> None:
    """`runs` is the distance of the lines; a first save may leave nothing, but no damage."""
    old, new = posteriors
    folder, counts, line = tmp_path / "run", Counter[str](), 1
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not first:
            old.save(folder)
        killed = killed_at_line(line, lambda: new.save(folder, overwrite=True))
        if first and not (folder / FILE).exists():
            counts[OLD] += 1
        else:
            found = which(load(folder), posteriors)
            assert killed or found == 1
            counts[(OLD, RIGHT)[found]] += 1
        check_usable(folder, old)
        if not killed:
            break
        line += runs
    assert line > 30
    report(f"killed before a line of a {'first' if first else 'second'} save", counts)


@sized(10, 300)
def test_two_write_and_two_read(
    runs: int, posteriors: tuple[bh.Posterior, bh.Posterior], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    posteriors[0].save(folder)

    def writes(posterior: bh.Posterior) -> list[str]:
        return [posterior.save(folder, overwrite=True) and RIGHT for _ in range(runs)]

    def reads() -> list[str]:
        return [(OLD, RIGHT)[which(load(folder), posteriors)] for _ in range(runs)]

    work = [lambda: writes(posteriors[0]), lambda: writes(posteriors[1]), reads, reads]
    results = [tmp_path / str(number) for number in range(len(work))]
    children = [start(each, result) for each, result in zip(work, results, strict=True)]
    assert [wait(child) for child in children] == [0] * len(work)
    for what, some in (("two write", results[:2]), ("two read", results[2:])):
        report(what, Counter(x for result in some for x in json.loads(result.read_text())))
    check_usable(folder, posteriors[0])


# Files that were damaged, and files that were made up


def limited() -> None:
    """A file that makes the program take two more GiB, or a minute, has won."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))


def ending(forecast: Callable[[], torch.Tensor], expected: torch.Tensor | None = None) -> str:
    """How a forecast of what was damaged ends; with `expected`, only this one counts as right."""
    signal.alarm(60)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = forecast()
            right = expected is None or torch.equal(found, expected)
    except BHPEFTError:
        return ERROR
    except Exception as error:
        return ERROR if is_out_of_memory(error) else f"{type(error).__name__}: {error!s:.80}"
    return RIGHT if right else "another answer"


def outcome(folder: Path, expected: torch.Tensor | None) -> str:
    return ending(lambda: predicted(load(folder)), expected)


def damaged(chance: random.Random, data: bytes) -> bytes:
    at, length = chance.randrange(len(data)), chance.randrange(1, 200)
    match chance.choice(["flip", "cut", "drop", "repeat", "zero", "noise"]):
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "drop":
            return data[:at] + data[at + length :]
        case "repeat":
            return data[:at] + data[at : at + length] + data[at:]
        case "zero":
            return data[:at] + bytes(length) + data[at + length :]
    return data[:at] + chance.randbytes(length) + data[at + length :]


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


def counted(what: str, runs: int, tmp_path: Path, attempt: Callable[[random.Random], str]) -> None:
    """The outcomes of attempts in a child process that has little memory and time."""

    def work() -> Counter[str]:
        limited()
        chance = random.Random(what)
        return Counter(attempt(chance) for _ in range(runs))

    report(what, Counter(in_a_child(work, tmp_path / "counts")))


@sized(100, 2000)
def test_damaged_files(
    runs: int, posteriors: tuple[bh.Posterior, bh.Posterior], tmp_path: Path
) -> None:
    folder = posteriors[1].save(tmp_path / "run")
    whole, header = (folder / FILE).read_bytes(), len(packed(*read(folder))[0])
    expected = predicted(posteriors[1])

    def attempt(chance: random.Random) -> str:
        parts = [whole[:header], whole[header:]]
        number = chance.randrange(2)
        parts[number] = damaged(chance, parts[number])
        (folder / FILE).write_bytes(b"".join(parts))
        return outcome(folder, expected)

    counted("damaged files", runs, tmp_path, attempt)


@sized(200, 5000)
def test_crafted_headers(
    runs: int, posteriors: tuple[bh.Posterior, bh.Posterior], tmp_path: Path
) -> None:
    """Their checksums are right, so that all that is read is in doubt."""
    folder = posteriors[1].save(tmp_path / "run")
    plain, tensors = read(folder)

    def attempt(chance: random.Random) -> str:
        made = json.loads(json.dumps(crafted(chance, plain)))
        (folder / FILE).write_bytes(b"".join(packed(made, tensors)))
        return outcome(folder, None)

    counted("crafted headers", runs, tmp_path, attempt)


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


@sized(40, 2000)
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
        found = outcome(folder, None)
        shutil.rmtree(folder)
        return found

    counted("crafted tensors", runs, tmp_path, attempt)


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
@sized(30, 1000)
def test_damaged_backbones_and_adapters(
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

    counted(f"damaged: {read.__name__}", runs, tmp_path, attempt)
