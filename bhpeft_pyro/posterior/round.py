"""A round of learning, which `fit`, `update` and `widen` make and run: one for each component."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base.checks import warn
from ..base.fit_options import FitOptions
from ..base.progress import bars, work
from ..base.values import derived
from ..data import Columns, Examples
from ..decisions.novelty import Novelty
from ..errors import ConfigError, FitError, PriorError
from ..guides import Guide
from ..model.model import Model
from ..peft.sites import Sites
from ..priors import Prior
from ..priors.any_prior import independent_normals
from ..training.loop import Setup, optimise
from ..training.report import FitReport
from .jobs import in_workers
from .mixture import Fitted, MixturePosterior, joined, parts_of
from .posterior import Posterior


@dataclass(frozen=True, eq=False)
class Round(Setup):
    """What one component is about to learn; held-out rows choose its width too.

    Attributes:
        facts: fields of the report that are known before.
        columns: how data are read.
        lineage: the reports of this component's earlier rounds; in the first round there are none.
        first_prior: in later rounds, the prior of the first one, if it is known.
        learnt_rows: what the last posterior has of this name.
    """

    data: Examples
    _: KW_ONLY
    facts: Mapping[str, Any]
    columns: Columns = Columns()
    lineage: tuple[FitReport, ...] = ()
    first_prior: Prior | None = None
    learnt_rows: Tensor | None = None

    def __post_init__(self) -> None:
        size, particles = self.options.batch_size, self.options.particles
        if size % particles and not self.guide.point:
            raise ConfigError(
                f"batch_size={size} must be a multiple of {particles}, as each weight draw gets an "
                "equal share of a batch; in Python, `particles` sets their number"
            )

    def run(self) -> Fitted:
        """Train the guide, and compute its width if that is not trained. A FitError carries the
        last good state."""
        started, strategy = time.monotonic(), self.guide.strategy
        self.guide.set_prior(self.model)
        strategy.drop_covariance()
        last_noise, report = self._last_noise(), FitReport(**self._known())
        try:
            with work(share=strategy.training_share):
                optimise(self, report)
            return self.with_width(vars(report), started, last_noise)
        except FitError as error:
            error.posterior = self._posterior(self.model, vars(report))
            raise

    def _last_noise(self) -> Tensor | None:
        """The noise scale of ratings before a later round that pools it with the errors of its own
        rows. A tau that is given, and a prior of the user's own, keep the width that they give."""
        likelihood = self.model.likelihood
        if not (self.pools_noise and likelihood.constant_noise):
            return None
        if self.options.tau is not None or self.facts["own_prior"]:
            return None
        return likelihood.log_noise(self.guide.means()).detach().clone()

    def with_width(
        self, fields: Mapping[str, Any], started: float, last_noise: Tensor | None = None
    ) -> Fitted:
        """The posterior once the guide is trained, in a round that `started` then by
        `time.monotonic`; `fields` are of its report."""
        model, width = self.guide.strategy.compute_width(
            self.model, self.data, self.held_out, self.options, self.earlier, last_noise
        )
        if width is not None:
            fields = {**fields, **width.reported, "points": []}
        seconds = fields.get("seconds", 0.0) + time.monotonic() - started
        return Fitted(self._posterior(model, {**fields, "seconds": seconds}), width)

    def _known(self) -> dict[str, Any]:
        """The fields of the report that are known before the fit."""
        used = self.held_out is not None and (self.guide.point or self.options.patience)
        return {
            "options": self.options,
            "temperature": self.temperature,
            "point": self.guide.point,
            "parent": self.lineage[-1].id if self.lineage else None,
            "separation": None if self.earlier is None else self.earlier.separation,
            "held_out": len(self.held_out) if self.held_out is not None and used else 0,
            **self.facts,
        }

    def _posterior(self, model: Model, fields: Mapping[str, Any]) -> Posterior:
        first: Prior | None = model.prior
        if self.lineage:
            first = self.guide.strategy.first_prior(self.first_prior)
        report = FitReport(**{**self._known(), **fields})
        made = Posterior(model, self.guide, (*self.lineage, report), self.columns, first)
        if self.lineage and self.learnt_rows is None:  # then those of this round are not all
            return made
        parts = (part.hashes for part in (self.data, self.held_out) if part)
        earlier = [] if self.learnt_rows is None else [self.learnt_rows]
        return made.replace(learnt_rows=torch.cat([*earlier, *parts]).unique())


def temperature(guide: Guide, options: FitOptions, enough: bool, default: float) -> float:
    """The weight of the KL to the prior: the one given, or 1 (the posterior), or the default of a
    point estimate.

    Args:
        guide: the guide.
        options: of the fit.
        enough: whether something else than the whole prior keeps a point estimate from
            overfitting: held-out rows, or the information of earlier data.
        default: the weight then.
    """
    if options.temperature is not None:
        return options.temperature
    return default if guide.point and enough else 1.0


def check_arguments(
    options: FitOptions,
    validation: object,
    optimizer: object,
    callback: object,
    executor: Executor | None,
) -> None:
    """Check the arguments that say how to fit, before data are read.

    Raises:
        ConfigError: one of them cannot work.
    """
    if isinstance(validation, int | float):
        raise ConfigError(f"validation={validation}: expected rows, or None to hold some out")
    if callback is not None and executor is not None:
        raise ConfigError("callback: an executor's workers cannot call it; expected None")
    pool = getattr(executor, "_mp_context", None)  # a process pool says it nowhere else
    if pool and pool.get_start_method() == "fork" and torch.get_num_threads() > 1:
        raise ConfigError(
            "executor: forked processes hang in torch if it uses several threads; expected "
            'ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))'
        )
    if options.patience and validation is None:
        raise ConfigError(
            f"patience={options.patience} needs validation data; patience=None fits to the end"
        )


def of_component(options: FitOptions, number: int) -> FitOptions:
    """The options of a component: the first has the seed given, the others one far from it."""
    return options.change(seed=derived(options.seed, number))


def first_sds(first_prior: Prior | None, sites: Sites) -> dict[str, Tensor] | None:
    """By site, the sds of the first round's prior, if it is known and Normal."""
    with suppress(PriorError):
        normals = independent_normals(first_prior, sites, [site.name for site in sites], "guide")
        return {name: sd for name, (_, sd) in normals.items()}
    return None


def run_all(
    rounds: Sequence[Round],
    executor: Executor | None,
    lineage: tuple[FitReport, ...] = (),
    novelty: Novelty | None = None,
) -> Posterior:
    """Run the rounds of a posterior's components, one after the other or in the workers of an
    executor, and join them.

    A FitError carries the fitted components, or else the last good state of the one that failed.
    Once there is a component, every error becomes a FitError.

    Args:
        rounds: one for each component, the first with the seed that was given.
        executor: has the workers.
        lineage: of a mixture, the reports of its earlier rounds.
        novelty: of the posterior, and of that of a FitError.
    """
    first, labels = rounds[0], rounds[0].data.labels
    if labels is not None and (off := first.model.likelihood.off_scale(labels)):
        warn(f"data: {off}; expected ratings of that scale")

    def here(number: int) -> Fitted:
        one = rounds[number]
        if len(rounds) > 1:
            whole.name(f"component {number + 1} of {len(rounds)}")
        if (callback := one.callback) is not None:
            one = replace(one, callback=lambda step: callback({"component": number, **step}))
        return one.run()

    results: Iterator[Fitted] = map(here, range(len(rounds)))
    if executor is not None:
        results = in_workers(executor, rounds)
    fitted: list[Fitted] = []

    def so_far(last: object) -> object:
        """The fitted components, or else the last good state of the one that failed."""
        if fitted:
            components = [component.posterior for component in fitted]
            last = MixturePosterior.of_round(components, first.options, lineage)
        return last.replace(novelty=novelty) if isinstance(last, Posterior) else last

    parts = parts_of(len(rounds))
    with bars(first.options.progress), work("fit", parts, at_once=True) as whole:
        try:
            for component in results:
                fitted.append(component)
                whole.next()
            whole.name("mixture")
            posterior = joined(fitted, first.held_out, first.options, labels, lineage)
        except FitError as error:
            error.posterior = so_far(error.posterior)
            raise
        except Exception as error:  # too little memory, say
            if not fitted:
                raise
            done = f"{len(fitted)} of {len(rounds)} components"
            failed = FitError(f"the fit ended after {done}: {error!r}")
            failed.posterior = so_far(None)
            raise failed from error
    return posterior.replace(novelty=novelty)
