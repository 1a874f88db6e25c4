"""The grid: what a method is given, files that survive a kill, and tables from them alone."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, SaveError
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.guides import LaplaceGuide, MeanFieldGuide
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer
from tools.experiments import scores, tasks
from tools.experiments.budgets import BUDGETS, Budget
from tools.experiments.grid import grid_experiments
from tools.experiments.job import Fitted, Job, load_frozen
from tools.experiments.methods import INFERENCE, Method
from tools.experiments.outcome import Outcome
from tools.experiments.runs import Given, results
from tools.experiments.tasks import split

TINY = BUDGETS["tiny"]
ONCE = replace(TINY, search=1, steps=2)
CHEAP = ("hybrid, deterministic", "hybrid, deterministic + scaling", "head only, deterministic")


class Grid:
    """Runs of methods on tiny tasks."""

    def __init__(
        self, out: Path, *methods: str, budget: Budget = TINY, tasks: tuple[str, ...] = ("classes",)
    ) -> None:
        self.experiment = grid_experiments(budget)["tasks"]
        setting = {**self.experiment.setting, "tasks": tasks, "methods": methods}
        self.given = Given(setting, partial(load_frozen, "tiny", "cpu"), "tiny", None, out)
        self.runs = self.experiment.runs(setting, budget.seeds)

    def outcomes(self) -> list[Outcome]:
        return results(self.experiment, self.given, self.runs)

    def run(self, *run: Any) -> Outcome:
        self.given.out.mkdir(exist_ok=True)
        path = self.given.out / "one"
        content = self.experiment.run(self.given, *run)
        assert isinstance(content, bytes)
        path.write_bytes(content)
        return Outcome.read(path)

    def table(self) -> str:
        made = self.experiment.tables(self.outcomes())
        return "\n".join(table.markdown() for table in made)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """One run of each kind of task, by a method with draws."""
    budget = replace(ONCE, seeds=1)
    where = tmp_path_factory.mktemp("runs")
    those = ("classes", "ratings", "choices", "two classes")
    return Grid(where, "LoRA, MC dropout", budget=budget, tasks=those).outcomes()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """The same by the default, whose forecasts are in closed form."""
    likelihood = partial(bh.likelihoods.Normal, spread=2.0)
    rated = replace(TINY.tasks["ratings"], outputs=1, likelihood=likelihood)
    budget = replace(ONCE, seeds=1, tasks={**TINY.tasks, "ratings": rated})
    where = tmp_path_factory.mktemp("closed")
    those = ("classes", "ratings", "choices", "two classes")
    return Grid(where, "LoRA, Bayesian", budget=budget, tasks=those).outcomes()


def test_a_grid_that_was_killed_goes_on_and_gives_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Grid(tmp_path / "whole", *CHEAP, budget=ONCE).table()
    original, calls = INFERENCE["deterministic"], []

    def killed(job: Job) -> Fitted:
        calls.append(job.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(job)

    monkeypatch.setitem(INFERENCE, "deterministic", killed)
    part = Grid(tmp_path / "part", *CHEAP, budget=ONCE)
    with pytest.raises(KeyboardInterrupt):
        part.outcomes()
    assert len(list((tmp_path / "part").iterdir())) == 1  # nothing is left of the run that died
    assert part.table() == table
    assert calls == [0, 0, 0, 1, 1]  # scaling is no run of its own
    assert f"validation {TINY.validation}," in table and f"steps {ONCE.steps}," in table


def test_files_of_another_setting_or_of_other_data_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other texts with the same labels would be paired row by row."""
    budget = replace(TINY, seeds=1, search=1)
    both = ("hybrid, deterministic", "head only, deterministic")
    one, other = tmp_path / "one", tmp_path / "other"
    Grid(one, both[0], budget=budget).outcomes()
    files = sorted(one.iterdir())
    with pytest.raises(ConfigError, match="was run with steps 4, not 5; take another folder"):
        Grid(one, *both, budget=replace(budget, steps=5)).outcomes()
    rows = [{**row, "text": f"{row['text']} w9"} for row in tasks.ROWS["tiny-classes"]()]
    monkeypatch.setitem(tasks.ROWS, "tiny-classes", lambda: rows)
    with pytest.raises(ConfigError, match="was run with other data; take another folder"):
        Grid(one, *both, budget=budget).outcomes()
    assert sorted(one.iterdir()) == files  # before anything was fitted
    Grid(other, both[1], budget=budget).outcomes()
    for path in other.iterdir():
        path.rename(one / path.name)
    with pytest.raises(ConfigError, match="was run with other data"):
        Grid(one, *both, budget=budget).table()


def test_a_file_has_all_of_an_outcome(
    outcomes: list[Outcome], closed: list[Outcome], tmp_path: Path
) -> None:
    for number, outcome in enumerate([*outcomes, *closed]):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(outcome.to_bytes())
        again = Outcome.read(path)
        assert again.facts == json.loads(json.dumps(outcome.facts))
        assert again.forecasts.keys() == outcome.forecasts.keys()
        old, new = outcome.forecasts["test"], again.forecasts["test"]
        assert metrics.evaluate(new) == metrics.evaluate(old)
        ratings = isinstance(new, bh.forecast.RatingForecast)
        if outcome in outcomes:
            assert new.draws == old.draws == TINY.samples
        else:  # components of ratings with one noise, and draws of all other outputs
            assert new.draws == old.draws == (TINY.members if ratings else 1000)
        for name in ("total", "epistemic", *(["between"] if outcome in closed else [])):
            assert torch.equal(*(getattr(each, name) for each in (old, new)))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(SaveError, match="is no result of an experiment"):
        Outcome.read(tmp_path / "bad.safetensors")


def test_a_method_never_gets_a_tests_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    original = INFERENCE["deterministic"]

    def spy(job: Job) -> Fitted:
        fitted = original(job)
        train = {*job.train["text"], *job.validation["text"]}

        def predict(rows: Dataset) -> Any:
            if rows is not job.validation:
                seen.append(rows.column_names)
                assert not train & {*rows["text"]}
            return fitted.predict(rows)

        return replace(fitted, predict=predict)

    monkeypatch.setitem(INFERENCE, "deterministic", spy)
    budget = replace(TINY, seeds=1, search=1)
    those = ("ratings", "two classes")  # these with names of the classes beside the labels
    Grid(tmp_path, "head only, deterministic", budget=budget, tasks=those).outcomes()
    assert seen == [["text"], ["text"], ["text"]]


# How far draws are apart, and the variance of each one's own mean.
@pytest.mark.parametrize(("spread", "within"), [(0.0, None), (4.0, None), (4.0, 2.0), (0.0, 2.0)])
def test_scaled_ratings_have_unit_standardised_errors_on_the_validation_rows(
    spread: float, within: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = 3 * torch.randn(500, generator=generator)
    means = spread * torch.randn(8, 500, generator=generator)
    own = None if within is None else torch.full((8, 500), within)
    forecast = bh.forecast.RatingForecast.from_draws(
        means, torch.ones(8, 500), within=own, labels=labels
    )
    mended = scores.scaled(Outcome({}, {"validation": forecast})).forecasts["validation"]
    assert isinstance(mended, bh.forecast.RatingForecast)
    assert ((labels - mended.mean) / mended.sd).square().mean().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(mended.mean, forecast.mean)
    ratio = mended.epistemic / mended.total
    torch.testing.assert_close(ratio, forecast.epistemic / forecast.total)


def test_classes_are_scaled_by_the_temperature_of_the_validation_rows() -> None:
    """Sure and wrong there; right on the test, where no temperature would be the best."""
    draws = torch.tensor([[0.9, 0.1]]).expand(1, 40, 2)
    wrong, right = torch.arange(40) % 2, torch.zeros(40, dtype=torch.long)
    made = {
        name: bh.forecast.ClassForecast.from_draws(draws, labels=labels, keep_samples=True)
        for name, labels in (("validation", wrong), ("test", right))
    }
    mended = scores.scaled(Outcome({}, made)).forecasts["test"]
    assert isinstance(mended, bh.forecast.ClassForecast)
    torch.testing.assert_close(mended.probabilities, torch.full((40, 2), 0.5), atol=0.02, rtol=0)


@pytest.mark.parametrize("inference", sorted(INFERENCE))
def test_every_way_to_infer_runs(inference: str, tmp_path: Path) -> None:
    budget = replace(TINY, seeds=1, search=1, steps=2)
    made = Grid(tmp_path, str(Method("LoRA", inference)), budget=budget)
    outcome = made.run("classes", 60, "LoRA", inference, 0)
    draws = {"deterministic": 1, "MAP": 1, "ensemble": TINY.members}
    draws |= dict.fromkeys(("one component", "Bayesian"), 1000)  # of the outputs
    students = [name for name in INFERENCE if name.startswith("student")]
    draws |= dict.fromkeys(students, 1)
    assert outcome.forecasts["test"].draws == draws.get(inference, TINY.samples)
    of_all = ("ensemble", "Bayesian", *students)
    points = ("deterministic", "one component", "MC dropout", *of_all)
    assert outcome.facts["temperature"] == (0.0 if inference in points else 1.0)
    components = outcome.facts.get("components", [])
    count = {"deterministic": 1, "one component": 1}
    count |= dict.fromkeys(of_all, TINY.members)
    assert len(components) == count.get(inference, 0)
    if inference in ("one component", "Bayesian"):
        assert all(each["tau"] > 0 and each["component_nll"] > 0 for each in components)
    if inference in of_all:
        # Of three classes, without the frozen pass for novelty.
        passes = {"ensemble": TINY.members, "Bayesian": 3 * TINY.members}
        passes |= dict.fromkeys(students, 1)
        assert outcome.facts["passes"] == passes[inference]


def test_the_search_takes_what_is_best_on_the_validation_rows(tmp_path: Path) -> None:
    budget = replace(TINY, steps=8)
    made = Grid(tmp_path, "head only, deterministic", budget=budget)
    outcome = made.run("classes", 48, "head only", "deterministic", 0)
    facts = outcome.facts
    assert len(facts["tried"]) == 2
    best = min(facts["tried"], key=lambda each: each["nll"])
    assert facts["chosen"] == {"lr": best["lr"]}
    held_out = outcome.forecasts["validation"]
    assert metrics.evaluate(held_out)["nll"] == pytest.approx(best["nll"], rel=1e-6)
    parts = split(None, TINY.tasks["classes"], 48, TINY.validation, TINY.test, 0)
    assert held_out.observed().tolist() == parts.validation["label"][:]


def test_points_are_fitted_once_for_all_that_is_made_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a method adds to the points is then all that it differs by."""
    fits: list[int] = []
    fit = Job.fit

    def counted(self: Job, *rest: Any, **options: Any) -> bh.Posterior:
        fits.append(options.get("seed", self.seed))
        return fit(self, *rest, **options)

    monkeypatch.setattr(Job, "fit", counted)
    budget = replace(TINY, members=3, steps=2)
    parts = split(None, budget.tasks["classes"], 24, budget.validation, budget.test, 7)
    kinds, load = bh.presets.lora(2), lambda: (tiny_backbone(), tiny_tokenizer())
    what = budget.tasks["classes"]
    data = parts.train, parts.validation, parts.unlabelled
    job = Job(what, kinds, load, *data, 7, budget)
    names = ("deterministic", "ensemble", "one component", "Bayesian")
    one, several, wide, mixture = (INFERENCE[name](job) for name in names)
    assert fits == [7, 7, 1007, 2007]  # two settings, and then the better one for all
    assert one.posterior.guide is several.posterior.components[0].guide
    for point, laplace in ((one, wide), (several, mixture)):
        both = [each.posterior.components for each in (point, laplace)]
        assert laplace.facts["chosen"] == point.facts["chosen"]
        for first, second in zip(*both, strict=True):
            assert type(first.guide) is MeanFieldGuide and type(second.guide) is LaplaceGuide
            trained = second.guide.unpack(second.guide.loc.detach())  # whatever the output scale
            for name, value in first.guide.means().items():
                assert torch.equal(value, trained[name])
    members = several.posterior.components
    rows = parts.tests["test"].select_columns(["text"])
    expected = torch.stack([each.predict(rows, 0).probabilities for each in members]).mean(0)
    torch.testing.assert_close(several.predict(rows).probabilities, expected)
    INFERENCE["deterministic"](replace(job, seed=8))
    assert fits[4:] == [8, 8]  # of another job nothing is shared
    INFERENCE["ensemble"](replace(job, seed=8, load=lambda: load()))
    assert fits[6:] == [8, 8, 1008, 2008]  # nor of another transformer
