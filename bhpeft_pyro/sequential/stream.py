"""A stream of batches: predict each first, then learn it (prequential evaluation, Dawid 1984)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data import Columns, Examples, encode
from ..data.encoding import CutWarning, cut_once
from ..errors import ConfigError, DataError, GuideError
from ..forecast import ClassForecast
from ..forecast.metrics import evaluate
from ..guides import GuideLike, autoguide, prior_guide
from ..guides.guide import title
from ..inference.draws import seeded
from ..inference.predict import AnyForecast, predict
from ..model.model import Model
from ..options import FitOptions
from ..posterior.fit import fit
from ..posterior.posterior import MixturePosterior, Posterior
from ..posterior.stored import check_savable
from .drift import assess, check_samples
from .forgetting import Forgetting
from .growth import check_growing, unknown_labels, with_outputs_for
from .history import History, check_same, resume
from .record import TEST, TEST_NLL, UNTRAINED, Record
from .update import Replay

__all__ = ["Learner", "prequential", "stream"]

Learner = Callable[[Posterior | None, object], Posterior]
Batches = Mapping[str, object] | Iterable[tuple[str, object]]

_UNTRAINED = 8  # draws of the first prior, whose forecasts are near chance; each costs a pass


def stream(
    model: Model,
    batches: Batches,
    folder: str | Path,
    *,
    guide: GuideLike = "laplace",
    components: int | None = None,
    tests: Mapping[str, object] | None = None,
    unlabelled: object | None = None,
    columns: Columns = Columns(),
    options: FitOptions | None = None,
    keep: float | Mapping[str, float] = 1.0,
    floor: float = 0.0,
    replay: Replay | None = None,
    grow: bool = False,
    again: bool = False,
    samples: int = 32,
    progress: bool = True,
    **changes: Any,
) -> Posterior:
    """Run through batches in order: predict, compare with what was expected, learn, save.

    Killed at any moment and called again with the same arguments, it goes on after the last round
    that was saved: a round is in the folder whole or not at all, with its predictions' metrics in
    its report, and all else (`record.json`, `record.csv`) is made from the rounds.

    Args:
        model: not fitted yet.
        batches: data in order of time by name: a mapping, or pairs. Names and data have to be the
            same ones after a restart.
        folder: `rounds/` in it is a `History`.
        guide, components: as for `fit`; the first batch is learnt with `fit`, the others with
            `update`.
        tests: held-out data by name, scored after every round, for `Record.matrix`. One for each
            batch, in their order, makes `Record.transfer` possible.
        unlabelled, columns, options: as for `fit`, single options by name too. A small
            first batch is a reason to give unlabelled texts.
        keep, floor, replay, grow, again: as for `Posterior.update`.
        samples: draws of each prediction; twice as many before a round (`assess`).
        progress: show a bar.

    Returns:
        The last posterior; `Record.of` it is the table of all rounds.

    Raises:
        ConfigError: the folder holds other rounds than these, or rounds of another guide.
        DataError: a batch or a test cannot be used, or a batch is the same as an earlier one.
        GuideError: a point guide, which can be no prior, or one that cannot `grow`.
        PriorError: `keep` or `floor` has no closed form under the guide.
        SaveError: the model cannot be saved, such as one with a likelihood of your own.

    >>> import tempfile
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> weeks = {f"week {i}": tiny_examples(12, seed=i) for i in range(3)}
    >>> last = stream(tiny_model(()), weeks, tempfile.mkdtemp(), max_steps=3, progress=False)
    >>> [row["batch"] for row in Record.of(last).rows]
    ['week 0', 'week 1', 'week 2']
    """
    chosen = (options or FitOptions()).change(**{"progress": False, **changes})
    tests = _kept(tests)
    _check_tests(model, tests, replace(columns, label_names=None))
    with seeded(chosen.seed):
        made = autoguide(guide, model, components=1)
    made.options()  # what cannot be saved would cost a round
    if grow:
        check_growing(model, made)
    forgetting = Forgetting(keep, floor)
    if forgetting != Forgetting():
        with suppress(GuideError):  # some have no posterior before a fit
            last = made.own_prior()
            forgetting(last, model.prior, model.sites)

    def learn(last: Posterior | None, data: object) -> Posterior:
        if last is None:
            first = fit(
                model,
                guide,
                data,
                unlabelled=unlabelled,
                columns=columns,
                options=chosen,
                replay=replay,
                components=components,
            )
            first.as_prior()  # what can be no prior is refused before it is a round
            return first
        own = last.components[0] if isinstance(last, MixturePosterior) else last
        if type(own.guide) is not type(made):
            raise ConfigError(
                f"guide: {folder} holds rounds of {title(own.guide)}, not {title(made)}; expected "
                "the same guide, or another folder"
            )
        return last.update(
            data, options=chosen, keep=keep, floor=floor, replay=replay, grow=grow, again=again
        )

    return prequential(
        model, learn, batches, folder, tests=tests, grow=grow, samples=samples, progress=progress
    )


def prequential(
    model: Model,
    learn: Learner,
    batches: Batches,
    folder: str | Path,
    *,
    tests: Mapping[str, object] | None = None,
    grow: bool = False,
    samples: int = 32,
    drift: bool = True,
    progress: bool = True,
) -> Posterior:
    """`stream` with any way to learn.

    Args:
        model: as it is before the first round.
        learn: from the last posterior (None in the first round) and a batch to the next posterior,
            whose lineage goes on from the last one's.
        batches, folder, tests, grow, samples, progress: as for `stream`.
        drift: compare batches with what was expected (`assess`). Without, a batch is predicted
            with `samples` draws, which may be 0, and the guide may be a point.

    >>> import tempfile
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> weeks = {f"week {i}": tiny_examples(12, seed=i) for i in range(2)}
    >>> def learn(last, data):  # the first prior in every round: only the start is the last one's
    ...     if last is None:
    ...         return fit(tiny_model(()), "normal", data, max_steps=3, progress=False)
    ...     return last.update(data, keep=0.0)
    >>> folder = tempfile.mkdtemp()
    >>> last = prequential(tiny_model(()), learn, weeks, folder, drift=False, progress=False)
    >>> len(last.lineage), last.report.keep
    (2, 0.0)
    """
    check_savable(model)
    if drift:
        check_samples(samples)
    tests = _kept(tests)
    folder = Path(folder)
    history = History(folder / "rounds")
    history.clean()
    posterior = resume(history, model)
    done = () if posterior is None else posterior.lineage
    pairs = list(batches.items()) if isinstance(batches, Mapping) else batches
    total = len(pairs) if isinstance(pairs, Sized) else None
    with cut_once(), tqdm(pairs, "stream", total, disable=not progress, unit="round") as bar:
        number = -1
        for number, (called, data) in enumerate(bar):
            name = str(called)  # dates and numbers too
            if isinstance(data, Iterator):  # predicted, then learnt
                data = list(data)
            if number < len(done):
                assert posterior is not None
                check_same(posterior, number, name, data)
                continue
            metrics: dict[str, float] = {}
            if posterior is not None:
                if grow and (labels := unknown_labels(posterior, data)):
                    posterior = posterior.grow(labels)
                examples = _encoded(posterior, data, f"batches: {name!r}")
                if drift:
                    found = assess(posterior, examples, samples)
                    metrics = evaluate(found.forecast)
                    metrics |= {f"drift/{key}": value for key, value in found.metrics().items()}
                    bar.set_postfix(nll=f"{metrics['nll']:.3f}", advice=found.advice, refresh=False)
                else:
                    metrics = posterior.evaluate(examples, samples)
            first = posterior is None
            posterior = learn(posterior, data)
            if tests:
                metrics |= _scores(posterior, tests, samples, first)
            if name in tests and not unknown_labels(posterior, tests[name]):
                # Held out of the same batch: `update` is to know all of it too.
                parts = (_encoded(posterior, part, name) for part in (data, tests[name]))
                posterior.report.given = Examples.concat(*parts).fingerprint
            history.add(posterior, name, metrics)
            Record.of(posterior).save(folder)
    if posterior is None:
        raise DataError("batches is empty: at least one is needed")
    if len(posterior.lineage) > number + 1:
        raise ConfigError(
            f"folder: {folder} holds {len(posterior.lineage)} rounds, of more batches than the "
            f"{number + 1} given"
        )
    Record.of(posterior).save(folder)
    return posterior


def _kept(tests: Mapping[str, object] | None) -> dict[str, object]:
    """Tests that can be read in every round."""
    return {
        str(name): list(data) if isinstance(data, Iterator) else data
        for name, data in (tests or {}).items()
    }


def _encoded(posterior: Posterior, data: object, what: str) -> Examples:
    try:
        with_outputs_for(posterior, data, grow=False)  # has the clearer error
        return posterior.encode(data)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def _check_tests(model: Model, tests: Mapping[str, object], columns: Columns) -> None:
    """Before anything is learnt: later they would cost a round.

    Which classes there are is not known yet.
    """
    for name, data in tests.items():
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=CutWarning)  # it is said when they count
                examples = encode(
                    data,
                    model.network.tokenizer,
                    kind=model.likelihood.kind,
                    columns=model.limited(columns, data),
                    labelled=False,
                )
        except DataError as error:
            raise DataError(f"tests: {name!r}: {error}") from error
        if examples.labels is None:
            raise DataError(f"tests: {name!r}: labels are missing")


def _scores(
    posterior: Posterior, tests: Mapping[str, object], samples: int, first: bool
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, data in tests.items():
        if unknown_labels(posterior, data):  # they are still to come
            continue
        examples = posterior.encode(data)
        forecast = posterior.predict(examples, samples)
        found |= {TEST + name: _score(forecast), TEST_NLL + name: evaluate(forecast)["nll"]}
        if first:
            untrained = _untrained(posterior.model, examples)
            found[UNTRAINED + name] = _score(untrained)
    return found


def _untrained(model: Model, examples: Examples) -> AnyForecast:
    return predict(model, prior_guide(model), examples, _UNTRAINED)


def _score(forecast: AnyForecast) -> float:
    """Accuracy, or minus the MSE: more is better."""
    metrics = evaluate(forecast)
    return metrics["accuracy"] if isinstance(forecast, ClassForecast) else -metrics["mse"]
