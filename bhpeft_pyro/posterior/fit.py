"""`fit`, and what every round has in common with the first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim
from torch import nn
from torch.optim import Optimizer

from ..checks import COUNT, check, check_memory, shown
from ..data import Columns, Examples
from ..errors import ConfigError, DataError, FitError
from ..guides import COMPONENTS, Guide, GuideLike, autoguide, check_made_for
from ..guides.guide import components_of, is_linear, is_point, prior_of
from ..inference.draws import sampling, seeded
from ..inference.initialization import align, may_start, own_start, scatter, start
from ..inference.loop import OptimizerFactory, as_module, optimise
from ..inference.passes import naming_rows
from ..inference.report import FitReport
from ..inference.width import refine, settle
from ..model.likelihoods import HeteroscedasticNormal, Likelihood, Normal
from ..model.model import Model
from ..options import FitOptions
from ..priors.prior import check_prior
from .mixture import MixturePosterior, keeping, seeds
from .posterior import Coreset, Posterior

if TYPE_CHECKING:
    from ..sequential import Replay

__all__ = [
    "check_how",
    "fit",
    "fit_round",
    "is_open",
    "joined",
    "needs_rows",
    "pull_of",
]


def pull_of(guide: nn.Module) -> float | None:
    """The default weight of an earlier posterior at a point estimate; None for other guides."""
    return guide.pull if isinstance(guide, Guide) and guide.point else None


# So many of the first round's texts set the head's axes and the PEFT sites' coordinates.
_HEAD_TEXTS, _PEFT_TEXTS = 2000, 128
_BY_NAME = str | type | Mapping
_FAR = 8.0  # spreads of a likelihood of ratings


@sampling()
def fit(
    model: Model,
    guide: GuideLike | Guide | AutoGuide | nn.Module | Callable[..., Any],
    data: object,
    *,
    validation: object | None = None,
    unlabelled: object | None = None,
    columns: Columns = Columns(),
    options: FitOptions | None = None,
    optimizer: OptimizerFactory | None = None,
    replay: Replay | None = None,
    components: int | None = None,
    **changes: Any,
) -> Posterior:
    """Fit a guide to data by stochastic variational inference.

    Args:
        model: the model. What an earlier fit has measured on its network stays, the head's axes and
            the PEFT sites' coordinates: so each fold of a cross-validation needs a new one.
        guide: what `autoguide` takes, a guide (fitted in place), or a function with
            `pyro.param` statements.
        data: anything `data.encode` reads: a `datasets.Dataset`, a hub name, a CSV or JSON lines
            file, a mapping of lists.
        validation: as `data`; its NLL is reported, and stops the fit if `patience` is set. Points
            ("laplace", "delta") are stopped early on it, and the width of a "laplace" guide is the
            one that suits it; without, a fifth of 50 rows or more is held out of `data` for that.
        unlabelled: as `data`, of which the texts alone are read: the head's axes and the PEFT
            sites' coordinates are those of these texts, for this round and all later ones. By
            default those of `data`; where these are few, the coordinates are poor.
        columns: how the data are read: the names of their columns, where texts are cut, and the
            order of the classes.
        options: how to fit; single options may be given by name instead (`epochs=5`).
        optimizer: from parameters to a torch optimiser; by default `NaturalGradient`
            for Normal guides and Adam for what else there is.
        replay: hold a coreset out, as `Posterior.update` does.
        components: K independent fits, each from another seed and another start, as one
            `MixturePosterior`; of a guide given by name, 5 of "laplace" and 1 of the others.

    Raises:
        ConfigError: an option or `components` that cannot work, or a guide that has but one start.
        DataError: the data cannot be used. Checked before anything is trained, as are options.
        GuideError: the guide cannot be made, or was made for another model.
        LikelihoodError: the likelihood's distribution has not one label an example.
        FitError: the loss stayed non-finite; its `posterior` is the last good state, or a mixture
            of the components before the one that failed.

    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> posterior.report.steps
    3
    """
    if not isinstance(model, Model):
        raise ConfigError(
            f"model: expected a bh.Model, got {type(model).__name__}; a structure of your own goes "
            "into its prior or its likelihood (Pyro's own inference takes any function)"
        )
    check(columns, Columns, "columns", "bh.Columns(...)")
    check(options, FitOptions | None, "options", "bh.FitOptions(...) or None")
    options = (options or FitOptions()).change(**changes)
    check_how(options, validation, optimizer, replay)
    if unlabelled is not None and model.network.measured:
        raise ConfigError(
            "unlabelled: an earlier fit has set the coordinates of this network, which stay; "
            "expected a new RandomPEFT"
        )
    count = _components(components, guide, model)
    examples = model.encode(data, columns, new_names=True)
    columns = replace(columns, label_names=examples.label_names)
    held_out = None if validation is None else model.encode(validation, columns)
    _check_classes(examples, columns.label)
    likelihood = model.likelihood.standardised(examples.labels)
    if likelihood is not model.likelihood:
        model = Model(model.network, model.prior, likelihood)
    check_prior(model.prior, model.sites)
    every = seeds(options, count)
    modules = [as_module(each) for each in _made(guide, model, every)]
    for module in modules:
        check_made_for(model, module)
    point = is_point(modules[0])
    if options.particles > 1 and not point:  # a point has but one draw
        check_prior(model.prior, model.sites, vectorised=True)
    named = partial(naming_rows, model, data=examples, validation=held_out)
    given, split = examples.fingerprint, None
    if held_out is None and needs_rows(modules[0], options):
        examples, held_out = examples.hold_out(options.seed)
        split = None if held_out is None else options.seed
    splits = [
        (None, examples) if replay is None else replay.split(examples, own.seed) for own in every
    ]
    texts = examples if unlabelled is None else model.encode_texts(unlabelled, columns)
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(options.seed))
    with named(unlabelled=None if texts is examples else texts):
        model.network.align(batch for _, batch in texts.subset(chosen[:_HEAD_TEXTS]).by_length(32))
    batches = [batch for _, batch in texts.subset(chosen[:_PEFT_TEXTS]).by_length(16)]
    open_scales = is_open(model)
    fitted: list[Posterior] = []
    for module, own, (kept, rest) in zip(modules, every, splits, strict=True):
        report = FitReport(len(examples), examples.fingerprint, own, given=given, split=split)
        report.held_out = len(held_out) if point and held_out is not None else 0
        first = model
        with seeded(own.seed), named():
            if isinstance(module, Guide):
                module.follow(model)
            if isinstance(module, Guide) and point:
                report.pull = 1.0 if held_out is None else 0.0
                first = _start_point(model, module, rest, report)
            elif may_start(module, own):
                start(model, module, rest, own, batches)
            elif own.temperature != 0:  # else there is no posterior, and the weights are trained
                align(model, batches)  # once: coordinates are one for all
            if fitted and isinstance(module, Guide) and not _starts_anew(module, report):
                scatter(model, module, own)
        posterior = Posterior(first, module, (report,), columns, first.prior)
        with keeping(fitted, options), named():
            fitted.append(fit_round(posterior, rest, held_out, optimizer, kept, open_scales))
            fitted[-1].first_prior = fitted[-1].model.prior
    with named():
        return joined(fitted, held_out, options)


def needs_rows(guide: nn.Module, options: FitOptions) -> bool:
    """Whether held-out rows choose something about a guide."""
    return isinstance(guide, Guide) and guide.needs_held_out(options)


def _starts_anew(guide: Guide, report: FitReport) -> bool:
    """Whether a guide starts at random weights of its own."""
    return guide.own_mode or (guide.point and report.temperature == 0)


def _start_point(model: Model, guide: Guide, examples: Examples, report: FitReport) -> Model:
    """Move a point estimate to its start.

    Returns:
        The model, under a prior that is centred there if the guide's is.
    """
    labels = examples.labels
    assert labels is not None
    own = own_start(model, report.options.seed) if _starts_anew(guide, report) else {}
    prior = guide.centre(own)
    guide.move(own | model.likelihood.start(labels))
    return model if prior is None else Model(model.network, prior, model.likelihood)


def _components(given: Any, guide: object, model: Model) -> int:
    """How many components there are to be.

    Raises:
        ConfigError: none, or another number than the guide has.
    """
    if isinstance(guide, nn.Module):
        count = len(components_of(guide))
        if given not in (None, count):
            raise ConfigError(
                f"components={given}: the {type(guide).__name__} given has {count}; expected None, "
                "or a guide that can be made anew: a name, a class, a mapping or a function"
            )
        return count
    if given is None:
        return COMPONENTS.get(guide, 1) if isinstance(guide, str) else 1
    given = COUNT("components", given)
    check_memory("components", given, 8 * sum(site.numel for site in model.sites))
    return given


def _made(guide: Any, model: Model, every: Sequence[FitOptions]) -> list[Any]:
    if isinstance(guide, nn.Module):
        return [*components_of(guide)]
    if not isinstance(guide, _BY_NAME):
        return [guide] * len(every)
    made = []
    for own in every:
        with seeded(own.seed):
            made.append(autoguide(guide, model, components=1))
    return made


def check_how(
    options: FitOptions, validation: object | None, optimizer: object, replay: object
) -> None:
    """Early stopping has something to look at, and there are an optimiser and a coreset to make.

    Raises:
        ConfigError: not so.
    """
    if replay is not None and not hasattr(replay, "by"):  # its class is made of ours
        raise ConfigError(f"replay: expected a bh.Replay or None, got {shown(replay)}")
    if optimizer is not None and (
        not callable(optimizer) or isinstance(optimizer, (Optimizer, PyroOptim))
    ):
        raise ConfigError(
            f"optimizer: got a {type(optimizer).__name__}, expected a function from parameters to "
            "an optimiser of torch, such as lambda found: torch.optim.Adam(found, lr=0.01)"
        )
    if options.patience and validation is None:
        raise ConfigError(
            f"patience={options.patience} needs validation data; patience=None fits to the end"
        )


def _check_classes(examples: Examples, column: str) -> None:
    """One class alone teaches nothing; later rounds may well bring examples of just one."""
    if examples.kind == "class" and examples.labels is not None:
        classes = examples.labels.unique()
        if len(classes) == 1:
            names = examples.label_names
            label = names[int(classes)] if names else int(classes)
            raise DataError(
                f"data: all {len(examples)} labels in column {column!r} are {label!r}; "
                "expected at least two classes"
            )


def fit_round(
    posterior: Posterior,
    examples: Examples,
    validation: Examples | None = None,
    optimizer: OptimizerFactory | None = None,
    kept: Examples | None = None,
    open_scales: bool = False,
) -> Posterior:
    """Fit a round's guide in place under its model's prior, as its last report says.

    Args:
        posterior: the round as it starts.
        examples: what it learns.
        kept: the coreset, learnt after the rest, by a copy of the guide.
        open_scales: whether the prior leaves the scales of sites to a Laplace approximation.

    Returns:
        The same posterior; with a coreset, another that has learnt it too.

    Raises:
        FitError: with the last good state.
    """
    guide, report = posterior.guide, posterior.report
    _note_scale(posterior.model.likelihood, examples)
    try:
        posterior.model = _learn(
            posterior.model, guide, examples, validation, report, optimizer, open_scales
        )
        return posterior if kept is None else _fit_coreset(posterior, kept, optimizer)
    except FitError as error:
        error.posterior = posterior
        raise


def is_open(model: Model) -> bool:
    """Whether a prior leaves the sites' scales to the data."""
    return bool(getattr(model.prior, "open", False))


def joined(
    fitted: Sequence[Posterior],
    held_out: Examples | None,
    options: FitOptions,
    lineage: tuple[FitReport, ...] = (),
) -> Posterior:
    """Components that have just been fitted as one posterior.

    Args:
        fitted: one or more.
        held_out: rows on which to see how much they disagree.
        options: those given for all of them.
        lineage: of the rounds before.
    """
    if len(fitted) == 1 and not lineage:
        return fitted[0]
    guides: list[Any] = [each.guide for each in fitted]
    found = None
    if len(guides) > 1 and all(getattr(guide, "candidates", None) for guide in guides):
        found = settle(guides, [each.report for each in fitted])
    mixture = MixturePosterior.joined(fitted, options, lineage)
    if found is not None:
        mixture.report.point_nll, mixture.report.component_nll = found
    if held_out is not None and is_linear(mixture.guide):
        forecast = mixture.predict(held_out)
        if forecast.between is not None:
            share = forecast.between.mean() / forecast.epistemic.mean().clamp_min(1e-12)
            mixture.report.between = share.item()
    return mixture


def _note_scale(likelihood: Likelihood, examples: Examples) -> None:
    """Warn of ratings that are far out, or in other units than those of the first round."""
    if isinstance(likelihood, Normal | HeteroscedasticNormal) and examples.labels is not None:
        away = (examples.labels - (likelihood.center or 0.0)).abs() / likelihood.unit
        if (most := away.max().item()) > _FAR:
            rating = examples.labels[away.argmax()].item()
            warnings.warn(
                f"data: a rating of {rating:g} is {most:.0f} spreads from the centre of "
                f"{likelihood}; expected ratings of that scale",
                stacklevel=2,
            )


def _learn(
    model: Model,
    guide: nn.Module,
    examples: Examples,
    validation: Examples | None,
    report: FitReport,
    optimizer: OptimizerFactory | None,
    open_scales: bool = False,
) -> Model:
    """Fit a guide, and measure its width if it has one to be measured.

    Returns:
        The model, under a prior in which nothing is left open.
    """
    if isinstance(guide, Guide):
        guide.follow(model)
        guide.hold()
    optimise(model, guide, examples, validation, report, optimizer)
    return refine(guide, model, examples, validation, report, open_scales)


def _fit_coreset(
    posterior: Posterior, kept: Examples, optimizer: OptimizerFactory | None
) -> Posterior:
    """The posterior that has learnt a coreset too; the one without it stays, for later rounds."""
    options = replace(posterior.report.options, patience=None)
    report = FitReport(len(kept), kept.fingerprint, options)
    core = posterior.guide
    guide = copy.deepcopy(core)
    model = Model(
        posterior.model.network, prior_of(posterior.model, core), posterior.model.likelihood
    )
    report.pull = pull_of(guide)
    _learn(model, guide, kept, None, report, optimizer)
    if isinstance(guide, Guide):
        guide.follow(posterior.model)  # under the round's own prior it has learnt all of it
    return posterior.replace(guide=guide, coreset=Coreset(kept, core, report))
