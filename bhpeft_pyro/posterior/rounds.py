"""One round of fitting: what the first round (`fit`) and later ones (`update`) have in common."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from ..base.checks import MAYBE_COUNT, check, derived
from ..base.distributed import Ranks, agree, gathered, same, world
from ..base.fit_options import FitOptions
from ..base.progress import bars, work
from ..data import Examples
from ..errors import ConfigError, FitError, PriorError
from ..forecast.metrics import Score
from ..guides import Guide
from ..guides.guide import prior_of
from ..guides.laplace.choice import Width
from ..model.model import Model
from ..priors import closed, independent_normals
from ..training.loop import Callback, OptimizerFactory, optimise
from ..training.report import FitReport
from .jobs import in_workers
from .mixture import MixturePosterior
from .posterior import Posterior
from .replay import Coreset

_MIXTURE = 0.2  # of the time of a component, about

Fitted = tuple[Posterior, Width | None]
"""A fitted component, and the width that was computed for it, if it has one."""


@dataclass(frozen=True, eq=False)
class Start:
    """A component before its fit.

    Attributes:
        posterior: with the guide's initial values.
        examples: what it learns.
        kept: the coreset, which a copy of the guide learns after the rest.
    """

    posterior: Posterior
    examples: Examples
    kept: Examples | None = None


@dataclass(frozen=True, eq=False)
class FitArguments:
    """The arguments of `fit` and `update` that say how to fit, checked before data are read."""

    options: FitOptions
    validation: object | None
    optimizer: Any
    callback: Callback | None
    executor: Executor | None
    replay: int | None

    def __post_init__(self) -> None:
        options, executor, optimizer = self.options, self.executor, self.optimizer
        agree("options", repr(options.change(progress=False)))
        check(executor, Executor | None, "executor", "a concurrent.futures.Executor or None")
        if self.callback is not None and executor is not None:
            raise ConfigError("callback: an executor's workers cannot call it; expected None")
        if executor is not None and world() > 1:
            raise ConfigError("executor: the ranks share the components out already; expected None")
        pool = getattr(executor, "_mp_context", None)  # a process pool says it nowhere else
        if pool and pool.get_start_method() == "fork" and torch.get_num_threads() > 1:
            raise ConfigError(
                "executor: forked processes hang in torch if it uses several threads; expected "
                'ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))'
            )
        MAYBE_COUNT("replay", self.replay)
        made = isinstance(optimizer, (Optimizer, PyroOptim))
        if optimizer is not None and (made or not callable(optimizer)):
            raise ConfigError(
                f"optimizer: got a {type(optimizer).__name__}, expected a function from parameters "
                "to a torch optimiser, such as "
                "lambda parameters: torch.optim.Adam(parameters, lr=0.01)"
            )
        check(self.callback, Callable | None, "callback", "a function of a step's record or None")
        if options.patience and self.validation is None:
            raise ConfigError(
                f"patience={options.patience} needs validation data; patience=None fits to the end"
            )


def note_first_prior(guide: Guide, posterior: Posterior) -> None:
    """Tell a guide that is made in a later round under which prior the first one was. Where that is
    not Normal or not known, the guide takes the prior of the last round for it."""
    if (sds := first_sds(posterior)) is not None:
        guide.strategy.set_first_prior_sds(sds, posterior.guide)


def first_sds(posterior: Posterior) -> dict[str, Tensor] | None:
    """By site, the sds of the first prior, if it is known and Normal."""
    sites = posterior.model.sites
    with suppress(PriorError):
        names = [site.name for site in sites]
        first = independent_normals(posterior.first_prior, sites, names, "guide")
        return {name: sd for name, (_, sd) in first.items()}
    return None


def seeds(options: FitOptions, components: int) -> list[FitOptions]:
    """The options of each component: the seed given, then others far from it."""
    return [options.change(seed=derived(options.seed, r)) for r in range(components)]


def fit_components(
    starts: Sequence[Start],
    held_out: Examples | None,
    how: FitArguments,
    lineage: tuple[FitReport, ...] = (),
) -> Posterior:
    """Fit components, one after the other or in the workers of an executor, and join them.

    The options in `how` are those given for all of them, `lineage` the reports of a mixture's
    rounds before. A FitError carries the fitted components, or else the last good state of the one
    that failed.
    """
    options, callback, executor = how.options, how.callback, how.executor
    labels, likelihood = starts[0].examples.labels, starts[0].posterior.model.likelihood
    if labels is not None and (off := likelihood.off_scale(labels)):
        warnings.warn(f"data: {off}; expected ratings of that scale", stacklevel=2)
    one = partial(fit_round, held_out=held_out, optimizer=how.optimizer)

    def here(numbered: tuple[int, Start]) -> Fitted:
        number, start = numbered
        if len(starts) > 1:
            whole.name(f"component {number + 1} of {len(starts)}")
        return one(start, callback=callback and partial(_tell, callback, number))

    away = 0 if executor is None else len(starts)
    if executor is None and world() > 1 and callback is None:
        executor = Ranks()  # as many for each; what is left is fitted by all of them together
        away = len(starts) // world() * world()
    each: Iterator[Fitted] = map(here, enumerate(starts[away:], away))
    if executor is not None and away:
        known = []
        for start in starts[:away]:
            last, model = start.posterior, start.posterior.model
            known.append((model.network, model.prior, last.first_prior, start.examples, held_out))
            last.report.options = last.report.options.change(progress=False)
        each = chain(in_workers(executor, one, starts[:away], known), each)
    fitted: list[Fitted] = []
    parts = parts_of(len(starts))
    with bars(options.progress), work("fit", parts, at_once=True) as whole:
        try:
            for component in each:
                report = component[0].report
                report.options = report.options.change(progress=options.progress)
                fitted.append(component)
                whole.next()
        except FitError as error:
            if fitted:
                components = [posterior for posterior, _ in fitted]
                error.posterior = MixturePosterior.joined(components, options, lineage)
            raise
        whole.name("mixture")
        posterior = joined(fitted, held_out, options, lineage, starts[0].examples.labels)
    posterior.report.id = gathered(posterior.report.id)[0]  # each rank has made its own
    return posterior


def _tell(callback: Callback, component: int, record: dict[str, float]) -> None:
    callback({"component": component, **record})


def fit_round(
    start: Start,
    held_out: Examples | None = None,
    optimizer: OptimizerFactory | None = None,
    callback: Callback | None = None,
) -> Fitted:
    """Fit a component's guide in place. A FitError carries the last good state.

    `callback` is not called while the coreset is learnt.
    """
    posterior = start.posterior
    try:
        with work(parts=1 if start.kept is None else 2) as both:
            width = _learn(start, held_out, optimizer, callback)
            both.next()
            if start.kept is None:
                return posterior, width
            return _fit_coreset(posterior, start.kept, optimizer), width
    except FitError as error:
        error.posterior = posterior
        raise


def joined(
    fitted: Sequence[Fitted],
    held_out: Examples | None,
    options: FitOptions,
    lineage: tuple[FitReport, ...] = (),
    known: Tensor | None = None,
) -> Posterior:
    """Components that have just been fitted as one posterior, their widths chosen together.

    Their disagreement and their score are measured on the rows `held_out`, the score beside the
    simplest forecast from the labels `known`; the rest is as for `fit_components`.
    """
    components = [posterior for posterior, _ in fitted]
    if len(components) == 1 and not lineage:
        return components[0]
    with work(share=_MIXTURE) as last:
        mixture = _mixed(fitted, held_out, options, lineage, known)
        last.next()
    return mixture


def parts_of(components: int) -> float:
    """The parts of the work on so many components, with what `joined` adds."""
    return components + _MIXTURE * (components > 1)


def _mixed(
    fitted: Sequence[Fitted],
    held_out: Examples | None,
    options: FitOptions,
    lineage: tuple[FitReport, ...],
    known: Tensor | None,
) -> Posterior:
    components = [posterior for posterior, _ in fitted]
    widths = [width for _, width in fitted if width is not None and width.candidates is not None]
    nlls = None
    if len(widths) == len(fitted) > 1:
        guides = [
            [holder.guide for holder in (each, each.coreset) if holder] for each in components
        ]
        strategy = components[0].guide.strategy
        widths, *nlls = strategy.choose_together(guides, widths)
        for component, width in zip(components, widths, strict=True):
            note_width(component.report, width)
    mixture = MixturePosterior.joined(components, options, lineage)
    if nlls is not None:
        mixture.report.point_nll, mixture.report.component_nll = nlls
    if held_out is not None and mixture.guide.linear:
        forecast = mixture.predict(held_out)
        if known is not None:
            mixture.report.score = str(Score.of(forecast, known))
        if forecast.between is not None:
            share = forecast.between.mean() / forecast.epistemic.mean().clamp_min(1e-12)
            mixture.report.between = share.item()
    return mixture


def _learn(
    start: Start,
    held_out: Examples | None,
    optimizer: OptimizerFactory | None,
    callback: Callback | None = None,
) -> Width | None:
    """Fit a guide and compute its width, if it has one that is not trained."""
    posterior, examples = start.posterior, start.examples
    guide, report = posterior.guide, posterior.report
    strategy = guide.strategy
    guide.set_prior(posterior.model)
    strategy.drop_covariance()
    if guide.point and report.pull is None:
        report.pull = strategy.default_temperature
    first = posterior.first_prior is posterior.model.prior
    with work(share=strategy.training):
        optimise(posterior.model, guide, examples, held_out, report, optimizer, callback)
    posterior.model, width = compute_width(guide, posterior.model, examples, held_out, report)
    if first:
        posterior.first_prior = posterior.model.prior
    else:
        posterior.first_prior = strategy.first_prior(posterior.first_prior)
    same(guide, trained=True)
    return width


def compute_width(
    guide: Guide,
    model: Model,
    examples: Examples,
    held_out: Examples | None,
    report: FitReport,
) -> tuple[Model, Width | None]:
    """Compute what is not trained, and put it into the report; returns are as those of
    `Strategy.compute_width`."""
    started = time.monotonic()
    model, width = guide.strategy.compute_width(
        model, examples, held_out, report.options, report.output_scale
    )
    if width is not None:
        note_width(report, width)
        report.points = []
        report.seconds += time.monotonic() - started
    return model, width


def note_width(report: FitReport, width: Width) -> None:
    """Put a width into a report."""
    for name, value in width.reported().items():
        setattr(report, name, value)


def _fit_coreset(
    posterior: Posterior, kept: Examples, optimizer: OptimizerFactory | None
) -> Posterior:
    """A posterior that has learnt a coreset too; the one without it is kept for later rounds."""
    options = replace(posterior.report.options, patience=None)
    report = FitReport(len(kept), kept.fingerprint, options, parent=posterior.report.id)
    core, model = posterior.guide, posterior.model
    guide = copy.deepcopy(core)
    report.output_scale = posterior.report.output_scale
    report.pull = 1.0 if guide.point and kept.few else posterior.report.pull
    after = model.with_prior(closed(prior_of(model, core)))  # this round has set its scales
    later = posterior.replace(model=after, guide=guide, lineage=(report,))
    _learn(Start(later, kept), None, optimizer)
    guide.set_prior(model)  # it has learnt all of the round under the round's own prior
    return posterior.replace(guide=guide, coreset=Coreset(kept, core, report))
