"""Random arguments, columns and command lines: a right answer or an error of our own, ever."""

from __future__ import annotations

import collections
import decimal
import fractions
import math
import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

import bhpeft_pyro as bh
from bhpeft_pyro import diagnostics, plots
from bhpeft_pyro.base import checks
from bhpeft_pyro.cli.app import app
from bhpeft_pyro.diagnostics.changes import changes, shifts
from bhpeft_pyro.errors import BHPEFTError, ConfigError, DataError, GuideError, SaveError
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.integrations.arviz import to_arviz
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

SMALL, LARGE = 200, 10_000

TEXTS, LABELS = ["w5 w9", "w6 w8", "w5", "w6 w7"], [0, 1, 0, 1]


class Rude:
    """Whatever is asked of it, it fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __len__(self) -> int:
        raise RuntimeError("no length")


def odd(draw: random.Random) -> Any:
    """A value that is seldom what an argument takes."""
    return draw.choice(
        (
            *(None, True, False, 0, 1, 2, 3, -1, 1.5, 10**20, 10**5000, -0.0, 0.5, 1e-300, 1e300),
            *(math.nan, math.inf, -math.inf, 1j, decimal.Decimal("0.5"), fractions.Fraction(1, 2)),
            *("", " ", "a", "\0", "\x1b[31m", "\ud800", "a" * 300, "w5 " * 300, "x.csv", "a/b"),
            *(b"a", b"", bytearray(b"a"), [], (), {}, set(), {1}, frozenset("ab"), range(3)),
            *(["a"], ["w5", None], [["w5", "w6"]], [{}], [{"text": "w5"}], {"text": ["w5"]}, [[]]),
            *(np.int64(3), np.float32(0.5), np.bool_(True), np.array(3), np.array([1.5, math.nan])),
            *(np.array(["w5"]), np.array([["w5"]]), np.datetime64("NaT"), np.array(None)),
            *(torch.tensor(3), torch.tensor([1, 2]), torch.zeros(0), torch.tensor(math.nan)),
            *(pd.NA, pd.NaT, pd.Series(["w5"]), pd.DataFrame(), pd.DataFrame({"text": ["w5"]})),
            *(object(), object, len, Path("a"), Path(), Rude(), iter([]), iter(["w5"]), Ellipsis),
            *({}.keys(), {"w5": 0}.keys(), collections.UserList(["w5"]), collections.Counter("a")),
            *(bh.Columns(), bh.FitOptions(), bh.Head(2), 3, bh.likelihoods.Normal()),
        )
    )


def deep(draw: random.Random) -> Any:
    """Something that contains itself."""
    array, mapping, listed = np.empty(1, object), dict[str, Any](), list[Any]()
    array[0], mapping["a"] = array, mapping
    listed.append(listed)
    return draw.choice((array, mapping, listed, [1, listed], (listed,)))


def column(draw: random.Random) -> Any:
    """A column of a table, which may be in order."""
    if draw.random() < 0.3:
        return odd(draw)
    values = [
        deep(draw)
        if draw.random() < 0.05
        else odd(draw)
        if draw.random() < 0.2
        else draw.choice((0, 1, "w5", 0.5))
        for _ in TEXTS
    ]
    try:
        return draw.choice((list, tuple, np.array, pd.Series, iter, set, dict.fromkeys))(values)
    except Exception:  # NumPy's and Python's own, before the values come to us
        return values


def source(draw: random.Random) -> Any:
    """Something for `data`."""
    kind = draw.randrange(4)
    if kind == 0:
        return odd(draw)
    if kind == 1:
        return [odd(draw) for _ in range(draw.randrange(4))]
    table = {"text": TEXTS, "label": LABELS}
    for name in draw.sample(("text", "label", "other", 3, None), draw.randrange(1, 3)):
        table[name] = column(draw)  # type: ignore[index]
    if kind == 2:
        return table
    try:
        return pd.DataFrame(table)
    except Exception:
        return table


def few(draw: random.Random, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: odd(draw) for name in draw.sample(names, min(len(names), draw.randrange(1, 3)))}


def encoded(draw: random.Random) -> None:
    kind, labelled = draw.choice(("class", "labels", "rating", "choice")), draw.random() < 0.5
    each_word = draw.random() < 0.2
    bh.data.encode(
        source(draw), tiny_tokenizer(), kind=kind, each_word=each_word, labelled=labelled
    )


def encoded_from_lists(draw: random.Random) -> None:
    """Columns of lists, as several labels, words and choices are."""
    cells = ([], ["a"], ["a", "b"], [0, 1], '["a"]', "w5 w6", ["w5", "w6"], [odd(draw)], odd(draw))
    labelled = {"text": ["w5", "w6"], "label": draw.choice((["A", "B"], odd(draw)))}
    names = ("text", "label", "question", "choices", "answer")
    table = {name: [draw.choice((*cells, labelled)) for _ in range(3)] for name in names}
    kind = draw.choice(("class", "labels", "rating", "choice"))
    table |= {name: ["w5 w6"] * 3 for name in ("text", "question") if draw.random() < 0.7}
    each_word = draw.random() < 0.3
    bh.data.encode(table, tiny_tokenizer(), kind=kind, each_word=each_word)


def encoded_in_another_way(draw: random.Random) -> None:
    names = ("tokenizer", "kind", "columns", "num_labels")
    how = {"tokenizer": tiny_tokenizer(), "kind": "class", **few(draw, names)}
    bh.data.encode({"text": TEXTS, "label": LABELS}, **how)


def made(draw: random.Random) -> None:
    what: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
        (bh.FitOptions, tuple(vars(bh.FitOptions()))),
        (bh.Columns, tuple(vars(bh.Columns()))),
        (bh.Head, ("outputs", "pooling", "principal")),
        (bh.peft.LoRA, ("rank", "alpha", "targets", "layers", "gated")),
        (bh.peft.Adapter, ("size", "scale", "placement", "activation", "layers", "gated")),
        (bh.peft.Prefix, ("length", "encoder", "layers", "gated")),
        (bh.likelihoods.OrderedLogistic, ("levels",)),
        (bh.likelihoods.Normal, ("center", "spread")),
        (bh.priors.FunctionSpaceNormal, ("change", "spread", "head", "other")),
        (bh.RandomPEFT, ("backbone", "kinds", "head", "tokenizer")),
    )
    cls, names = draw.choice(what)
    needed: dict[Any, dict[str, Any]] = {
        bh.Head: {"outputs": 2},
        bh.RandomPEFT: {"backbone": tiny_backbone(), "kinds": (), "head": bh.Head(2)},
        bh.likelihoods.OrderedLogistic: {"levels": 3},
    }
    cls(**needed.get(cls, {}) | few(draw, names))


@pytest.fixture(scope="module")
def posterior() -> bh.Posterior:
    return bh.fit(tiny_model(()), "normal", tiny_examples(), max_steps=2, progress=False)


def used(draw: random.Random, posterior: bh.Posterior) -> None:
    forecast = posterior.predict(["w5"], 2)
    numbers = ("samples", "seed")
    named = replace(forecast, label_names=("a", "b"))
    what: tuple[Callable[[], Any], ...] = (
        lambda: posterior.predict(source(draw), samples=3),
        lambda: posterior.predict(
            ["w5"], **few(draw, (*numbers, "max_rows", "keep_samples", "bf16"))
        ),
        lambda: posterior.sample(**few(draw, numbers)),
        lambda: posterior.to_arviz(**{"samples": 2, **few(draw, (*numbers, "sites"))}),
        lambda: posterior.diagnose(tiny_examples(), **{"samples": 100, **few(draw, ("seed",))}),
        lambda: diagnostics.psis(posterior, tiny_examples(), **few(draw, numbers)),
        lambda: diagnostics.sbc(
            posterior.model, "normal", TEXTS, replications=odd(draw), **{"false_alarm": odd(draw)}
        ),
        lambda: posterior.assess(TEXTS, **few(draw, numbers)),
        lambda: posterior.update(source(draw), max_steps=1, progress=False),
        lambda: posterior.update(
            tiny_examples(seed=5),
            max_steps=1,
            progress=False,
            **few(draw, ("keep", "guide", "options", "optimizer", "validation")),
        ),
        lambda: posterior.grow(odd(draw)),
        lambda: forecast.flag(odd(draw), by=draw.choice(("total", odd(draw)))),
        lambda: forecast.by_row(odd(draw)),
        lambda: metrics.evaluate(forecast, odd(draw)),
        lambda: named.with_labels(odd(draw)),
        lambda: type(named).from_draws(
            torch.full((2, 1, 2), 0.5),
            **few(draw, ("labels", "texts", "label_names", "choices", "keep_samples")),
        ),
        lambda: changes(draw.choice((posterior, odd(draw))), **few(draw, numbers)),
        lambda: shifts(odd(draw)),
        lambda: to_arviz(odd(draw), samples=2),
        lambda: metrics.rejection_curve(forecast, [0], fractions=odd(draw)),
        lambda: posterior.weights(odd(draw), odd(draw)),
        lambda: bh.Posterior.load(odd(draw)),
        lambda: bh.Posterior.from_draws(posterior.model, odd(draw), statistics=odd(draw)),
    )
    draw.choice(what)()


def fitted(draw: random.Random) -> None:
    names = ("validation", "columns", "options", "optimizer", "components")
    given = {"data": tiny_examples(), "guide": "normal", **few(draw, (*names, "data", "guide"))}
    bh.fit(tiny_model(()), **{"max_steps": 1, "progress": False, **given})


def count(times: int, seed: int, act: Callable[[random.Random], None]) -> None:
    """Print how often each outcome came; foreign errors fail, with what repeats them."""
    found: collections.Counter[str] = collections.Counter()
    foreign: dict[str, str] = {}
    for number in range(times):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                act(random.Random(f"{seed} {number}"))
            found["answers"] += 1
        except BHPEFTError as error:
            found[type(error).__name__] += 1
            assert 0 < len(str(error)) < 2100
        except Exception as error:
            found["foreign"] += 1
            text = "".join(traceback.format_exception(error)[-4:])
            foreign.setdefault(f"{error!r:.60}", f"random.Random('{seed} {number}'): {text}")
    print(act.__name__, dict(found))
    assert not foreign, "\n\n".join(foreign.values())


def many(small: int = SMALL) -> Any:
    """Few in the suite, many behind the marker."""
    return pytest.mark.parametrize(
        "times", [small, pytest.param(LARGE * small // SMALL, marks=pytest.mark.torture)]
    )


@many()
@pytest.mark.parametrize("act", [encoded, encoded_from_lists, encoded_in_another_way, made])
def test_what_is_read_and_made(times: int, act: Callable[[random.Random], None]) -> None:
    count(times, 0, act)


@many(SMALL // 8)
def test_what_is_fitted(times: int) -> None:
    count(times, 1, fitted)


@many(SMALL // 4)
def test_what_is_done_with_a_posterior(times: int, posterior: bh.Posterior) -> None:
    def use(draw: random.Random) -> None:
        used(draw, posterior)

    count(times, 2, use)


@many(SMALL // 8)
def test_command_lines_and_their_files(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 0, 1 or 2, no traceback, and nothing that would control the terminal."""
    runner, group = CliRunner(), typer.main.get_command(app)
    names = [*group.commands]  # type: ignore[attr-defined]
    words = ["--config", "c.yaml", "--out", "--seed", "--flag", "--by", "--data", "10%", "-1"]
    words += ["1e9", "nan", "9" * 30, "a" * 300, "\x1b[31m", "", ".", "t.csv", "t.jsonl", "["]
    lines = ["seed: 3", "epochs: 2024-13-45", "a: [", "seed: {}", "lr: 1:2", "null: 3"]
    lines += ["? [a]\n: b", "&a [*a]", "seed: 0x", "out: \x01", "-" * 400]
    lines += ["seed: !!python/object:os.system x"]
    cells = ["text", "label", "w5", "", "\0", '"', ",", "\n", "\r", "0", "1", "é", "\x1b[31m"]
    json = ['{"text": "w5", "label": 0}', '{"text": 1, "text": 2}', "[" * 5000, "{", "[]"]
    found: collections.Counter[int] = collections.Counter()
    monkeypatch.chdir(tmp_path)
    for number in range(times):
        draw = random.Random(number)
        Path("c.yaml").write_text("\n".join(draw.choices(lines, k=2)))
        Path("t.csv").write_text("text,label\n" + ",".join(draw.choices(cells, k=9)))
        if draw.random() < 0.5:
            Path("t.csv").write_text(",".join(draw.choices(cells, k=12)))
        Path("t.jsonl").write_text("\n".join(draw.choices(json, k=2)))
        given = [draw.choice(names), *draw.choices(words, k=draw.randrange(6))]
        if draw.random() < 0.4:
            given = ["fit", draw.choice(("t.csv", "t.jsonl")), "--out", "o", "--backbone", "no"]
        result = runner.invoke(app, given)
        assert isinstance(result.exception, SystemExit | None), (number, given, result.exception)
        assert result.exit_code in (0, 1, 2), (number, given)
        assert "\x1b[31m" not in result.output, (number, given)
        found[result.exit_code] += 1
    print(dict(found))


def test_every_rule_shows_what_came() -> None:
    for rule in vars(checks).values():
        if isinstance(rule, checks.Number):
            with pytest.raises(BHPEFTError, match=r"^what=<Rude .*> must be "):
                rule("what", Rude())


def test_arguments_of_a_posterior(posterior: bh.Posterior) -> None:
    for sites in (0.5, [None], torch.tensor(1)):
        with pytest.raises(ConfigError, match=r"^sites=.* must be a str"):
            posterior.to_arviz(sites=sites)  # type: ignore[arg-type]
    takes: tuple[Any, ...] = (
        *(bh.Posterior.load, bh.Posterior.from_pretrained, posterior.save),
        *(posterior.save_pretrained, bh.streams.History, bh.streams.Record([]).save),
    )
    for path in (None, 3, "a\0"):
        for call in takes:
            with pytest.raises(ConfigError, match=r"(path|name|folder)=.* must be a path"):
                call(path)
    with pytest.raises(SaveError, match=r"cannot read .*: File name too long"):
        bh.Posterior.load("a" * 300)
    several = bh.forecast.LabelsForecast.from_draws(torch.rand(2, 4, 3))
    for threshold in ("a", None, 1j, [0.5]):
        with pytest.raises(DataError, match="threshold"):
            several.with_threshold(threshold)  # type: ignore[arg-type]
    for drawn in (plots.elbo_trace, plots.change_forest, plots.shift_by_layer, plots.rejection):
        with pytest.raises(ConfigError, match=r"expected|must be one or more"):
            drawn(3)  # type: ignore[operator]
    with pytest.raises(GuideError, match=r"guide's name or class, or a mapping, got 0\.5"):
        posterior.update(tiny_examples(seed=5), guide=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^labels=1,000,000,.* expected at most \d"):
        posterior.grow(10**20)
