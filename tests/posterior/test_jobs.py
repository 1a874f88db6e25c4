"""Components that are fitted in the workers of a `concurrent.futures.Executor`."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from components import FIRST, SECOND, fit, same
from jobs import Inline, assert_same
from saves import load
from torch.optim import Adam

import bhpeft_pyro as bh
from bhpeft_pyro.base.progress import told_to
from bhpeft_pyro.errors import ConfigError, FitError
from bhpeft_pyro.posterior.learn import optimise
from bhpeft_pyro.testing import tiny_examples, tiny_model

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
MANY = tiny_examples(60)  # some are held out


def forked(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_fits_and_rounds_are_the_same(guide: str) -> None:
    """Also where the first component's start sets the coordinates of all, or each has a prior."""
    posteriors = []
    for executor in (None, Inline()):
        torch.manual_seed(3)
        how: Any = {"max_steps": 3, "progress": False, "executor": executor}
        first = bh.fit(tiny_model(aligned=True), guide, MANY, components=2, **how)
        posteriors.append((first, first.update(SECOND, **how)))
    for one, other in zip(*posteriors, strict=True):
        assert_same(one, other)


@pytest.mark.slow
def test_other_processes_find_the_same() -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, torch.set_num_threads, (1,)) as pool:
        posteriors = [
            fit(of=tiny_model(prior=halved, aligned=True), executor=executor)
            for executor in (None, pool)
        ]
        assert_same(*posteriors)
        one, other = posteriors
        assert_same(one.update(SECOND), other.update(SECOND, executor=pool))


halved = lambda sites: {  # noqa: E731  (it has no name by which a worker could import it)
    site.name: pyro.sample(
        site.name, dist.Normal(0, site.unit / 2).expand(site.shape).to_event(len(site.shape))
    )
    for site in sites
}


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, pytest.param(forked, marks=needs_fork)])
def test_workers_may_be_threads_or_forked(pool: Any) -> None:
    """Threads wait for each other, but never for the fit, which waits for them."""
    with pool(2) as executor:
        assert_same(fit(executor=executor, components=2), fit(components=2))


def test_the_transformer_does_not_come_back() -> None:
    model, pool = tiny_model(), Inline()
    posterior = fit(of=model, components=2, executor=pool)
    assert posterior.model.network is model.network
    backbone = len(pickle.dumps(model.network.backbone.state_dict()))
    assert all(len(future.result()) < backbone / 2 for future in pool.futures)


def test_every_round_of_a_stream_uses_it(tmp_path: Path) -> None:
    how: Any = {"guide": "normal", "components": 2, "max_steps": 2, "progress": False}
    pool = Inline()
    weeks = {"one": FIRST, "two": SECOND}
    bh.streams.stream(tiny_model(()), weeks, tmp_path, executor=pool, **how)
    assert len(pool.futures) == 4


def test_the_bar_counts_components() -> None:
    shown: list[str] = []
    with told_to(lambda title, share, _: shown.append(f"{title}: {100 * (share or 0):.0f} %")):
        posterior = fit(of=tiny_model(()), executor=Inline(), progress=True)
    assert all(f"fit: {share} %" in shown for share in (31, 62, 94))
    assert not any("training" in state for state in shown)
    assert "mixture: 100 %" in shown
    assert all(each.report.options.progress for each in (posterior, *posterior.components))


def test_a_component_that_fails_leaves_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(())
    whole, pool = fit(of=model), Inline()
    reports = [each.report for each in whole.components]
    failing = [reports[1].options.seed]

    def sometimes(setup: Any, report: Any) -> None:
        if setup.options.seed in failing:
            raise FitError("not finite")
        optimise(setup, report)

    monkeypatch.setattr("bhpeft_pyro.posterior.learn.optimise", sometimes)
    with pytest.raises(FitError, match="not finite") as error:
        fit(of=model, executor=pool)
    kept: Any = error.value.posterior
    assert [*map(same, kept.components, whole.components[::2])] == [True, True]
    failing += [report.options.seed for report in reports]
    with pytest.raises(FitError, match="not finite") as error:
        fit(of=model, executor=pool)
    kept = error.value.posterior  # the last good state of the first
    assert kept.report.options == reports[0].options and kept.model.network is model.network


def test_a_worker_that_ends_leaves_all_others() -> None:
    model = tiny_model(())
    with pytest.raises(FitError, match=r"component 1 of 3: its worker failed.*gone") as error:
        fit(of=model, executor=Inline((0,), ValueError("gone")))
    kept: Any = error.value.posterior
    assert [*map(same, kept.components, fit(of=model).components[1:])] == [True, True]


def test_components_keep_their_lineages_after_one_has_failed(tmp_path: Path) -> None:
    first = fit(of=tiny_model(()))
    with pytest.raises(FitError, match="component 1 of 3") as error:
        first.update(SECOND, executor=Inline((0,), ValueError("gone")))
    kept: Any = error.value.posterior
    kept.save(tmp_path)
    lineages = [
        [[report.id for report in part.lineage] for part in posterior.components]
        for posterior in (kept, load(tmp_path))
    ]
    assert lineages[0] == lineages[1]


def test_components_keep_their_first_priors_after_one_has_failed() -> None:
    """Around a start of its own each."""
    first = fit("laplace", of=tiny_model())
    with pytest.raises(FitError, match="component 1 of 3") as error:
        first.update(SECOND, executor=Inline((0,), ValueError("gone")))
    kept: Any = error.value.posterior
    locs = [[prior.normal.loc for prior in each.first_priors] for each in (kept, first)]
    assert len(locs[0]) == 2 and all(map(torch.equal, locs[0], locs[1][1:]))
    assert not torch.equal(*locs[0])


def test_points_that_are_left_after_one_has_failed_can_be_widened() -> None:
    family = {"*": ("delta", {"width": 0.1})}
    first = fit(family, of=tiny_model())
    with pytest.raises(FitError, match="component 1 of 3") as error:
        first.update(SECOND, executor=Inline((0,), ValueError("gone")))
    kept: Any = error.value.posterior
    wide = kept.widen(SECOND, max_steps=1)
    assert len(wide.guides) == 2 and wide.linear
    assert [each.first_priors for each in wide.components] == [
        each.first_priors for each in kept.components
    ]


def test_ctrl_c_cancels_the_rest() -> None:
    class Pool(Inline):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.error = None if self.futures else KeyboardInterrupt()
            return super().submit(fn, *args, **kwargs)

    pool = Pool((0, 1, 2))
    with pytest.raises(KeyboardInterrupt):
        fit(of=tiny_model(()), executor=pool)
    assert [future.cancelled() for future in pool.futures] == [False, True, True]


def test_errors_of_the_users_own_code_say_where() -> None:
    def optimizer(_: Any) -> Adam:
        raise KeyError("lr")

    with pytest.raises(KeyError, match="lr") as error:
        fit(of=tiny_model(()), executor=Inline(), optimizer=optimizer)
    (note,) = error.value.__notes__
    assert note.startswith("In the worker") and "in optimizer" in note


def test_what_cannot_work_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match="callback: an executor's workers cannot call it"):
        bh.fit(tiny_model(), "normal", "no such data", executor=Inline(), callback=print)
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    with pytest.raises(ConfigError, match=r"executor: a fit cannot be sent .*after shutdown"):
        fit(of=tiny_model(()), executor=closed)
    lock = Lock()

    def optimizer(parameters: Any) -> Adam:
        with lock:
            return Adam(parameters)

    with pytest.raises(ConfigError, match=r"executor: a fit cannot be sent .*lock"):
        fit(of=tiny_model(()), executor=Inline(), optimizer=optimizer)


@needs_fork
def test_forked_workers_are_refused_where_they_would_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ConfigError, match=r"executor: forked processes hang.*spawn"):
        bh.fit(tiny_model(), "normal", "no such data", executor=forked(1))
