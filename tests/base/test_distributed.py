"""Several processes: they do what one does, and say so if they cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from components import equal
from program import bhpeft, write_csv
from ranks import together
from saves import backbone_in
from torch import Tensor
from torch.optim import SGD

import bhpeft_pyro as bh
from bhpeft_pyro.base import distributed
from bhpeft_pyro.errors import BHPEFTError
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.model.likelihoods import Function
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

ROWS, TEST = tiny_examples(63), tiny_examples(70, seed=2)  # three batches of a forecast
# Of 12 rows that four draws share, two of each go to one rank and one to the other.
CASES: dict[str, dict[str, Any]] = {
    "normal": {"particles": 4},
    "normal, accumulated": {"particles": 2, "accumulate": 2},
    "laplace": {"components": 1, "batch_size": 9, "particles": 1},
    "laplace, 3 components": {"components": 3, "batch_size": 9, "particles": 1},
    "delta": {"batch_size": 1, "particles": 1},  # fewer rows than ranks
}


def outcome(case: str) -> dict[str, Tensor]:
    """A fit's losses and state, and its forecast."""
    guide, *_ = case.split(",")
    options: dict[str, Any] = {"max_steps": 5, "batch_size": 12, "progress": False, **CASES[case]}
    if guide == "normal":
        options["lr"] = 0.1
    else:  # Adam makes steps of gradients that are zero but for rounding
        options["optimizer"] = lambda parameters: SGD(parameters, lr=1e-3)
    posterior = bh.fit(tiny_model(aligned=True), guide, ROWS, **options)
    history, forecast = posterior.report.history, posterior.predict(TEST, 8)
    assert isinstance(forecast, bh.forecast.ClassForecast)
    state = posterior.guide.state_dict()
    for number, part in enumerate(posterior.components):
        if isinstance(part.guide, LaplaceGuide):
            # The signs of the axes are rounding.
            whole = part.guide.covariance
            state[f"covariance {number}"] = whole.apply(torch.eye(len(part.guide.loc)))
    return {
        **{name: torch.tensor([step[name] for step in history]) for name in ("loss", "nll", "kl")},
        "probabilities": forecast.probabilities,
        "epistemic": forecast.epistemic,
        **{k: value for k, value in state.items() if value.numel() and not k.endswith("axes")},
    }


@cache
def of_two() -> list[dict[str, dict[str, Tensor]]]:
    return together(lambda: {case: outcome(case) for case in CASES})


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(case: str) -> None:
    one = outcome(case)
    first, second = (each[case] for each in of_two())
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        apart = (first[name].double() - value.double()).abs().max()
        assert apart <= 1e-3 * value.double().abs().max(), name


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all() -> None:
    def work() -> tuple[list[float], dict[str, Tensor]]:
        passes: list[bool] = []

        def shaky(outputs: Tensor) -> dist.Categorical:
            passes.append(torch.is_grad_enabled())  # of a step, which has two
            bad = distributed.rank() == 1 and passes[-1] and sum(passes) in (2, 3)
            return dist.Categorical(logits=outputs * (torch.nan if bad else 1.0))

        model = tiny_model((), likelihood=Function(shaky, "class"))
        how: dict[str, Any] = {"max_steps": 5, "accumulate": 2, "progress": False}
        posterior = bh.fit(model, "delta", ROWS, **how)
        steps = [step["step"] for step in posterior.report.history]
        return steps, posterior.guide.state_dict()

    (first, one), (second, other) = together(work)
    assert first == second == [3, 4, 5] and equal(one, other)


def caught(work: Callable[[], Any]) -> str:
    with pytest.raises(BHPEFTError) as error:
        work()
    return f"{type(error.value).__name__}: {error.value}"


def test_what_differs_is_refused_on_every_rank() -> None:
    model = tiny_model()
    posterior = bh.fit(model, "delta", ROWS, max_steps=1, progress=False)
    texts = [f"w5 w{number}" for number in range(7, 48)]
    quick: dict[str, Any] = {"max_steps": 1, "progress": False}

    def work() -> list[str]:
        own = distributed.rank()
        others = ROWS.subset(range(own, 30))

        def faster(parameters: Any) -> SGD:
            return SGD(parameters, lr=1e-3 * (1 + own))

        refused = [
            caught(lambda: bh.fit(model, "delta", ROWS, seed=own, progress=False)),
            caught(lambda: bh.fit(model, "delta", others, progress=False)),
            caught(lambda: posterior.predict(others)),
            caught(lambda: bh.fit(model, "delta", ROWS, optimizer=faster, **quick)),
        ]
        if own == 0:
            with distributed.independent():
                assert len(posterior.predict(others).texts) == 30
        with torch.no_grad():
            model.network.backbone.get_input_embeddings().weight[40] = torch.inf
        refused.append(caught(lambda: posterior.predict(texts)))  # it is in a batch of one rank
        return refused

    first, second = together(work)
    assert first == second
    starts = [
        f"ProcessError: {what}: not the same on rank 1" for what in ("options", "data", "data")
    ]
    assert all(text.startswith(start) for text, start in zip(first, starts, strict=False))
    assert first[3].startswith("ProcessError: guide: the ranks did not take the same steps")
    assert first[4].startswith("DataError: data, row 33: of 'w5 w40' ")


def test_a_rank_that_dies_ends_the_others_and_loses_no_round(tmp_path: Path) -> None:
    """Both ranks save; the first writes."""
    weeks = {f"week {number}": tiny_examples(16, seed=number) for number in range(3)}
    how: dict[str, Any] = {"max_steps": 3, "progress": False, "particles": 1}

    def die(record: dict[str, float]) -> None:
        if distributed.rank() == 1 and record["step"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(deadly: bool) -> tuple[str, str]:
        def learn(last: bh.Posterior | None, data: object) -> bh.Posterior:
            if last is None:
                posterior = bh.fit(tiny_model(()), "normal", data, **how)
                posterior.save(tmp_path / "first")
                return posterior
            return last.update(data, callback=die if deadly else None)

        def go() -> bh.Posterior:
            arguments = (tiny_model(()), learn, weeks, tmp_path / "stream")
            return bh.streams.prequential(*arguments, progress=False)

        return (caught(go), "") if deadly else ("", go().report.id)

    (lost, _), *_ = together(lambda: work(deadly=True), codes=(0, -signal.SIGKILL))
    assert lost.startswith("ProcessError: another process of this job has ended")
    history = bh.streams.History(tmp_path / "stream" / "rounds")
    (first,) = history.rounds
    backbone: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "backbone": tiny_backbone()}
    assert bh.Posterior.load(tmp_path / "first", **backbone).report.id == first
    (_, last), (_, same) = together(lambda: work(deadly=False))
    assert last == same and [*history.rounds][::2] == [first, last]
    assert len(history.load(last, **backbone).lineage) == 3


def fit_command(folder: Path) -> tuple[object, ...]:
    """`bhpeft fit` with a backbone and data that are written to the folder."""
    backbone_in(folder / "tiny")
    data = write_csv(
        folder / "train.csv",
        text=[f"w{5 + number % 2} w{9 + number}" for number in range(30)],
        label=["no", "yes"] * 15,
    )
    return "fit", data, "--backbone", folder / "tiny"


def test_a_program_that_is_launched_twice_prints_once(tmp_path: Path) -> None:
    fit = (*fit_command(tmp_path), "--out", tmp_path / "run")
    quick = ("--max-steps", 2, "--guide", "delta", "--preset", "head_only", "--device", "cpu")

    def run(*words: object, code: int = 0) -> list[tuple[str, str]]:
        def work() -> tuple[str, str]:
            done = bhpeft(*words, code=code)
            return done.stdout, done.stderr

        return together(work, launched=True)

    (result, notes), *others = run(*fit, *quick, "--json")
    assert json.loads(result)["steps"] == 2 and "saved in" in notes and others == [("", "")]
    for rank, (out, said) in enumerate(run("predict", tmp_path / "run", "none.csv", code=2)):
        assert out == "" and said.startswith(f"error: rank {rank}: ")
    assert len(bh.Posterior.load(tmp_path / "run", device="cpu").predict(["w5"]).texts) == 1


@pytest.mark.slow
def test_torchrun_and_accelerate_launch_it(tmp_path: Path) -> None:
    fit = (*fit_command(tmp_path), "--max-steps", 2, "--components", 2)

    def run(launcher: str, *words: object) -> str:
        command = [sys.executable, "-m", launcher, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    torchrun = ("torch.distributed.run", "--nproc-per-node", 2, "-m", "bhpeft_pyro")
    first = json.loads(run(*torchrun, *fit, "--out", tmp_path / "first", "--json"))
    pytest.importorskip("accelerate")
    accelerate = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2)
    accelerate = (*accelerate, "--main_process_port", 0, "-m", "bhpeft_pyro")
    second = json.loads(run(*accelerate, *fit, "--out", tmp_path / "second", "--json"))
    assert first == second and first["steps"] == 4
