"""`fit`: the first round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from torch import nn

from ..base.checks import warn
from ..base.fit_options import FitOptions
from ..base.isolation import locked, seeded, with_gradients
from ..base.progress import bars, tracked, work
from ..base.values import Count, checked_call
from ..data import Columns, Examples
from ..data.batch import Batch, random_order
from ..data.copies import check_apart, warn_of_contradictions, warn_of_copies
from ..decisions.novelty import Novelty
from ..errors import ConfigError, DataError
from ..guides import Guide, GuideLike, as_guide, autoguide, check_made_for
from ..guides.latent import with_mean
from ..guides.pyro_guides import PYROS
from ..guides.registry import default_components
from ..model.cached_batches import naming_rows
from ..model.model import Model, check_model
from ..priors.any_prior import in_words
from ..priors.prior import check_prior
from ..training.initialization import (
    align,
    centred,
    moved,
    narrowed,
    own_start,
    scatter,
    start,
)
from ..training.loop import Callback, OptimizerFactory, Setup
from .learn import check_arguments, check_batches, learn, of_component, report_of, temperature
from .posterior import Posterior

# How many texts determine the head's axes, and the coordinates of the PEFT sites.
_HEAD_TEXTS, _PEFT_TEXTS = 2000, 128


@locked()
@with_gradients()
@checked_call
def fit(
    model: Model,
    guide: GuideLike | nn.Module | Callable[..., Any] | Sequence[nn.Module],
    data: object,
    *,
    validation: object | None = None,
    columns: Columns = Columns(),
    options: FitOptions | None = None,
    optimizer: OptimizerFactory | None = None,
    callback: Callback | None = None,
    components: Count | None = None,
    executor: Executor | None = None,
    **changes: Any,
) -> Posterior:
    """Fit a guide to data: by stochastic variational inference, or as Laplace approximations.

    Args:
        model: the model. The head's axes and the coordinates of the PEFT sites, which the first fit
            estimates, stay with its network. Use a new network for each fold of a cross-validation.
        guide: what `autoguide` takes, a guide (fitted in place, from where it is if it has been
            fitted before), or a function with `pyro.param` statements; or a list of guides, one for
            each component. A single guide is one component, of whatever family.
        data: anything `data.encode` reads: a `datasets.Dataset`, a hub name, a CSV or JSON lines
            file, a mapping of lists.
        validation: as `data`. Its NLL is reported, and stops the fit if `patience` is set. If it
            has 50 rows or more, it chooses the state of point estimates ("laplace", "delta") that
            is kept, and stops their fits early, except for ratings. It also chooses the width of
            "laplace", and the noise scale of ratings or the output scale of classes and choices.
            Without it, a fifth of `data` (500 rows at most) is held out for this by "laplace" and
            "delta", if there are at least 50 rows with different texts.
        columns: how the data are read: the names of their columns, where texts are cut, and the
            order of the classes.
        options: how to fit; single options can be given by name instead (`epochs=5`).
        optimizer: a function from parameters to a torch optimiser. By default `NaturalGradient` for
            Normal guides and Adam for all others.
        callback: a function that is called after each step with a dict of numbers: "component"
            (from 0) and an entry of `FitReport.history` (step, loss, nll, kl, lr, ...).
        components: K independent fits with different seeds and initial values, as one posterior.
            By default 5 of "laplace" and 1 of other guides.
        executor: fits the components in its workers, such as the processes of a
            `concurrent.futures.ProcessPoolExecutor` (docs/integrations.md). A guide that is given
            as an object is then fitted as a copy.

    Raises:
        ConfigError: an option or `components` cannot work, or the guide cannot be made more than
            once. Options are checked before anything is trained, and so are the data.
        DataError: the data cannot be used; or every row of `validation` has a text of `data`.
        GuideError: the guide cannot be made, or was made for another model.
        LikelihoodError: the likelihood's distribution is not over one label per example.
        FitError: the loss stayed non-finite, or a worker ended, or anything else failed once a
            component was fitted, such as too little memory. Its `posterior` is a mixture of the
            components that were fitted, or else the last good state.

    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> posterior.report.steps
    3
    """
    check_model(model)
    options = (options or FitOptions()).change(**changes)
    check_arguments(options, validation, optimizer, callback, executor)
    count = _components(components, guide, model)
    with bars(options.progress):
        examples, held_out, columns = _read(model, data, validation, columns)
        likelihood = model.likelihood.standardised(examples.labels)
        if likelihood is not model.likelihood:
            model = Model(model.network, model.prior, likelihood)
        check_prior(model.prior, model.sites)
        guides = _made(guide, model, options, count)
        _check_guides(model, guides, options)
        if not model.network.aligned(head_only=guides[0].point):  # what an earlier posterior uses
            model = Model(model.network.unused(), model.prior, model.likelihood)  # stays
        with naming_rows(model, data=examples, validation=held_out):
            whole, split = examples, None
            if held_out is None and _chooses_by_rows(guides[0], options):
                if not examples.few:  # of which nothing is held out
                    warn_of_copies(examples)
                examples, held_out = examples.hold_out(options.seed)
                split = None if held_out is None else options.seed
            setups: list[Setup] = []
            for number, made in enumerate(guides):
                own = of_component(options, number)
                also: Any = {"optimizer": optimizer, "callback": callback}
                also["temperature"] = temperature(made, own, enough=held_out is not None)
                setups.append(Setup(model, made, examples, held_out, own, **also))
            setups = _initialised(model, setups)
            known = {"prior": in_words(model.prior), "data_with_held_out": whole.fingerprint}
            reports = [report_of(setup, split=split, **known) for setup in setups]
            novelty = Novelty.of(model, whole, options.keep_texts)
            start = Posterior(model, guides, (), columns, novelty=novelty)
            return learn(start, setups, reports, options, executor)


def _read(
    model: Model, data: object, validation: object | None, columns: Columns
) -> tuple[Examples, Examples | None, Columns]:
    """The rows to learn, those of `validation`, and how later data are to be read."""
    examples = model.encode(data, columns)
    if columns.label_names is None:  # else the user knows of other classes
        _check_classes(examples, columns.label)
    columns = model.columns_of(examples, columns)
    held_out = None if validation is None else model.encode(validation, columns)
    if held_out is not None:
        check_apart(examples, held_out, "validation")
    warn_of_contradictions(examples, held_out)
    return examples, held_out, columns


def _check_guides(model: Model, guides: Sequence[Guide], options: FitOptions) -> None:
    """Refuse guides of another model; warn if all components would become the same."""
    for guide in guides:
        check_made_for(model, guide)
        check_batches(options, guide)
    inner = {site.name for site in model.sites if site.role == "input"}
    alike = guides[0].centres_prior and inner and inner <= with_mean(model)
    if len(guides) > 1 and alike:
        warn(
            f"components={len(guides)}: all start at the mean of the prior, so they will hardly "
            "differ; expected components=1 under an earlier posterior"
        )


def _chooses_by_rows(guide: Guide, options: FitOptions) -> bool:
    """Whether held-out rows choose something about the guide: a point's state, or a width."""
    width = guide.centres_prior and options.tau is None
    return guide.point and (options.temperature is None or width)


def _initialised(model: Model, setups: Sequence[Setup]) -> list[Setup]:
    """Measure the backbone on some texts, and give all guides their initial values."""
    examples, seed = setups[0].examples, setups[0].options.seed
    chosen = random_order(len(examples), seed)
    some = examples.subset(chosen[:_HEAD_TEXTS])
    batches = (batch for _, batch in some.by_length(32))
    model.network.align(tracked(batches, "measuring the backbone", -(-len(some) // 32)))
    fewer = [batch for _, batch in examples.subset(chosen[:_PEFT_TEXTS]).by_length(16)]
    ready = []
    for number, setup in enumerate(setups):
        with work("preparing", at_once=True, share=0), seeded(setup.options.seed):
            ready.append(replace(setup, model=_started(setup, fewer)))
            if number > 0 and not _starts_at_random(setup):
                scatter(model, setup.guide)
    model.network.in_use = True
    return ready


def _starts_at_random(setup: Setup) -> bool:
    """Whether a guide starts at random weights of its own."""
    return setup.guide.centres_prior or (setup.guide.point and setup.temperature == 0)


def _started(setup: Setup, batches: list[Batch]) -> Model:
    """Give a guide its initial values. The model, whose prior is centred there if the guide's
    is."""
    model, guide, options = setup.model, setup.guide, setup.options
    guide.set_prior(model)
    if guide.point:
        labels = setup.examples.labels
        assert labels is not None
        drawn = own_start(model, options.seed) if _starts_at_random(setup) else {}
        initial = drawn | model.likelihood.start(labels)
        if not moved(model, guide, initial):  # by an earlier fit
            guide.move(initial)
        return centred(model, guide)
    if options.temperature != 0:  # at 0 the weights themselves are trained
        if guide.free_sds() and not narrowed(model, guide):
            start(model, guide, setup.examples, options, batches)
        else:
            align(model, batches)  # has an effect once: all components share the coordinates
    return model


def _components(given: Any, guide: object, model: Model) -> int:
    """The number of components, given or by default."""
    if type(guide) in PYROS.values():
        name = type(guide).__name__
        raise ConfigError(
            f"guide: got an {name} object, whose posterior could not be saved; pass {name}, the "
            f"class, or bh.autoguide({name}, model) with options"
        )
    if isinstance(guide, nn.Module | Sequence) and not isinstance(guide, str):
        count = 1 if isinstance(guide, nn.Module) else len(guide)
        if not count or given not in (None, count):
            raise ConfigError(
                f"components={given}: got {count} guides; expected None and one guide or more, or "
                "a guide that can be made again: a name, a class, a mapping or a function"
            )
        return count
    if given is None:
        return default_components(guide)
    return given


def _made(guide: Any, model: Model, options: FitOptions, count: int) -> list[Guide]:
    """One guide per component."""
    if isinstance(guide, nn.Module):
        return [as_guide(guide)]
    if isinstance(guide, Sequence) and not isinstance(guide, str):
        return [as_guide(one) for one in guide]
    named, made = isinstance(guide, str | type | Mapping), []
    for number in range(count):
        # A function, too, may draw initial values.
        with seeded(of_component(options, number).seed):
            made.append(autoguide(guide, model) if named else as_guide(guide))
    return made


def _check_classes(examples: Examples, column: str) -> None:
    """Unless others are named, a first round needs two classes; later ones may have only one."""
    if examples.kind == "class" and examples.labels is not None:
        classes = examples.labels.unique()
        if len(classes) == 1:
            names = examples.label_names or ()
            raise DataError(
                f"data: all {len(examples)} labels in column {column!r} are {names[classes]!r}; "
                "expected at least two classes"
            )
