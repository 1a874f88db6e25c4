"""Learning, which `fit`, `update` and `widen` share: each component is trained and gets its width;
then their widths are chosen together, and they become one posterior."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.checks import warn
from ..base.fit_options import FitOptions
from ..base.progress import bars, work
from ..base.values import derived
from ..errors import ConfigError, FitError
from ..forecast.metrics import scored
from ..guides import Guide
from ..guides.laplace.choice_of_tau import Width
from ..guides.laplace.width import choose_together
from ..priors import Prior
from ..training.loop import Setup, optimise
from ..training.report import FitReport
from .jobs import in_workers
from .posterior import Posterior

_JOINING = 0.2  # what joining components takes, of the time of one of them, about


class Fitted(NamedTuple):
    """A component after its round; a guide that is trained as a distribution has no width."""

    guide: Guide
    prior: Prior
    report: FitReport
    width: Width | None = None


def learn(
    last: Posterior,
    setups: Sequence[Setup],
    reports: Sequence[FitReport],
    options: FitOptions,
    executor: Executor | None = None,
    train: bool = True,
) -> Posterior:
    """Learn a round: all components, one after the other or in the workers of an executor.

    A FitError carries the components fitted so far, or else the last good state of the one that
    failed. Once there is a component, every error becomes a FitError.

    Args:
        last: the posterior before the round. In the first round, and for a new width of the last
            one, its lineage and rows are those of the rounds before.
        setups: what each component learns; its guide is fitted in place, but in a worker.
        reports: of each component, as far as they are known (`report_of`).
        options: those given for all components.
        executor: has the workers.
        train: whether the guides are trained; else they get a width alone.
    """
    jobs, first = list(zip(setups, reports, strict=True)), setups[0]
    # By id, as some components may fail; in the first round there are none yet.
    before = dict(zip((report.id for report in reports), last.first_priors, strict=True))
    labels, function = first.examples.labels, train_component if train else widen_component
    if train and labels is not None and (off := first.model.likelihood.off_scale(labels)):
        warn(f"data: {off}; expected ratings of that scale")

    def here(number: int) -> Fitted:
        setup, report = jobs[number]
        if len(jobs) > 1:
            whole.name(f"component {number + 1} of {len(jobs)}")
        if (callback := setup.callback) is not None:
            numbered = {"component": number}
            setup = replace(setup, callback=lambda step: callback(numbered | step))
        return function(setup, report)

    results: Iterator[Fitted] = map(here, range(len(jobs)))
    if executor is not None:
        results = in_workers(executor, function, jobs)
    fitted: list[Fitted] = []
    parts = len(jobs) + _JOINING * (len(jobs) > 1)
    with bars(options.progress), work("fit", parts, at_once=True) as whole:
        try:
            for component in results:
                fitted.append(component)
                whole.next()
            whole.name("mixture")
            return _joined(last, before, fitted, first, options)
        except FitError as error:
            if states := fitted or [state for state in [error.component] if state]:
                error.posterior = _as_posterior(last, before, states, first, options)
            raise
        except Exception as error:  # too little memory, say
            if not fitted:
                raise
            failed = FitError(
                f"the fit ended after {len(fitted)} of {len(jobs)} components: {error!r}"
            )
            failed.posterior = _as_posterior(last, before, fitted, first, options)
            raise failed from error


def train_component(setup: Setup, report: FitReport) -> Fitted:
    """Train a guide, and compute its width if that is not trained. A FitError carries the last good
    state."""
    started, guide = time.monotonic(), setup.guide
    guide.set_prior(setup.model)
    guide.drop_covariance()
    last_noise = _last_noise(setup)
    try:
        with work(share=0.8 if guide.centres_prior else 1.0):
            optimise(setup, report)
        return widen_component(setup, report, started, last_noise)
    except FitError as error:
        error.component = Fitted(guide, setup.model.prior, report)
        raise


def widen_component(
    setup: Setup,
    report: FitReport,
    started: float | None = None,
    last_noise: Tensor | None = None,
) -> Fitted:
    """Compute the width of a trained guide. By default it has `started` now, by `time.monotonic`,
    which is added to the report's seconds."""
    started = time.monotonic() if started is None else started
    model, width = setup.guide.compute_width(
        setup.model, setup.examples, setup.held_out, setup.options, setup.earlier, last_noise
    )
    if width is not None:
        report = replace(report, **width.reported, points=[])
    report = replace(report, seconds=report.seconds + time.monotonic() - started)
    return Fitted(setup.guide, model.prior, report, width)


def _last_noise(setup: Setup) -> Tensor | None:
    """The noise scale of ratings before a later round that pools it with the errors of its own
    rows. A tau that is given keeps the width that it gives."""
    likelihood = setup.model.likelihood
    if setup.options.tau is not None or not (setup.pools_noise and likelihood.linear_mean):
        return None
    return likelihood.log_noise(setup.guide.means()).detach().clone()


def _joined(
    last: Posterior,
    before: Mapping[str, Prior | None],
    fitted: Sequence[Fitted],
    setup: Setup,
    options: FitOptions,
) -> Posterior:
    """Components that have just been fitted as one posterior, with their widths chosen together;
    `setup` is of the first."""
    with work(share=_JOINING) as joining:
        fields = dict[str, Any]()
        widths = [x.width for x in fitted if x.width is not None and x.width.candidates is not None]
        if len(widths) == len(fitted) > 1:
            said, fields = choose_together([component.guide for component in fitted], widths)
            fitted = [
                component._replace(report=replace(component.report, **more))
                for component, more in zip(fitted, said, strict=True)
            ]
        posterior = _as_posterior(last, before, fitted, setup, options, **fields)
        labels, several = setup.examples.labels, bool(posterior.report.components)
        if several and setup.held_out is not None and labels is not None and posterior.linear:
            # Without backward passes, which would take as long as the choice of the widths.
            forecast = posterior.replace(novelty=None).predict(setup.held_out, 0)
            posterior = posterior.with_report(score=scored(forecast, labels))
        joining.next()
    return posterior


def _as_posterior(
    last: Posterior,
    before: Mapping[str, Prior | None],
    fitted: Sequence[Fitted],
    setup: Setup,
    options: FitOptions,
    **fields: Any,
) -> Posterior:
    """The posterior of fitted components.

    Args:
        last: the posterior before the round.
        before: the first prior of each component, by the id of its report.
        fitted: the components, of which some may be missing.
        setup: of the first component.
        options: those given for all components.
        fields: of the report of several.
    """
    guides, priors, reports, _ = zip(*fitted, strict=True)
    report, lineage = reports[0], last.lineage
    if len(fitted) > 1 or (lineage and lineage[-1].components):
        parent = lineage[-1].id if lineage else None
        report = FitReport.of_mixture(reports, options, parent, **fields)
    first: Sequence[Prior | None] = priors
    if lineage:
        pairs = zip(guides, reports, strict=True)
        first = [guide.first_prior(before[report.id]) for guide, report in pairs]
    rows = last.learnt_rows
    if not (lineage and rows is None):  # else those of this round are not all
        parts = [part.hashes for part in (setup.examples, setup.held_out) if part]
        rows = torch.cat([*([] if rows is None else [rows]), *parts]).unique()
    return last.replace(
        model=setup.model.with_prior(priors[0]),
        guides=guides,
        lineage=(*lineage, report),
        priors=priors,
        first_priors=tuple(first),
        learnt_rows=rows,
        student=None,
        promised=None,
    )


def report_of(setup: Setup, **fields: Any) -> FitReport:
    """The report of a component that is going to learn, with more fields."""
    earlier, held_out = setup.earlier, setup.held_out
    used = setup.guide.point or setup.options.patience
    known = {
        "examples": len(setup.examples),
        "data": setup.examples.fingerprint,
        "options": setup.options,
        "temperature": setup.temperature,
        "point": setup.guide.point,
        "separation": None if earlier is None else earlier.separation,
        "held_out": len(held_out) if held_out is not None and used else 0,
    }
    return FitReport(**{**known, **fields})


def temperature(guide: Guide, options: FitOptions, enough: bool, default: float = 0.0) -> float:
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


def check_batches(options: FitOptions, guide: Guide) -> None:
    """Refuse batches that the draws of the weights cannot share equally."""
    size, particles = options.batch_size, options.particles
    if size % particles and not guide.point:
        raise ConfigError(
            f"batch_size={size} must be a multiple of {particles}, as each weight draw gets an "
            "equal share of a batch; in Python, `particles` sets their number"
        )


def of_component(options: FitOptions, number: int) -> FitOptions:
    """The options of a component: the first has the seed given, the others one far from it."""
    return options.change(seed=derived(options.seed, number))
