"""A stream of batches: predict each first, then learn it (prequential evaluation, Dawid 1984)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, get_args

from ..base.checks import shown, warn
from ..base.fit_options import FitOptions
from ..base.isolation import seeded
from ..base.names import Method
from ..base.progress import bars, work
from ..base.values import Flag, Share, checked_call
from ..data import Columns, Examples
from ..data.copies import shared
from ..data.encoding import cut_once
from ..decisions.watching import watched
from ..errors import ConfigError, DataError
from ..forecast.metrics import evaluate, standard_errors
from ..guides import GuideLike, autoguide
from ..guides.guide import prior_of
from ..model.model import Model, check_model
from ..posterior.codec import pack
from ..posterior.distill import texts_for, with_student
from ..posterior.fit import fit
from ..posterior.forgetting import forget
from ..posterior.growth import check_growing, unknown_labels, with_outputs_for
from ..posterior.posterior import Posterior
from ..posterior.saving import pack_model
from .drift import assess
from .history import ROUNDS, History
from .record import TEST, TEST_NLL, Record
from .resume import (
    about,
    check_promise,
    check_same_batch,
    check_same_stream,
    check_same_tests,
    check_tests,
    last_round,
)

Learner = Callable[[Posterior | None, object], Posterior]
Batches = Mapping[str, object] | Iterable[tuple[str, object]]


@checked_call
def stream(
    model: Model,
    batches: Batches,
    folder: str | Path,
    *,
    guide: GuideLike = "laplace",
    components: int | None = None,
    executor: Executor | None = None,
    tests: Mapping[str, object] | None = None,
    columns: Columns = Columns(),
    options: FitOptions | None = None,
    keep: Share = 1.0,
    grow: Flag = False,
    again: Flag = False,
    distill: object | None = None,
    promise: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **changes: Any,
) -> Posterior:
    """Go through batches in order: predict, compare with what was expected, learn, save.

    A stream that was killed resumes after the last saved round when it is called again with the
    same arguments. `keep` and the options of the fit may differ: a warning says so, and each
    round's report has its own. A round is in the folder whole or not at all, with its predictions'
    metrics in its report; `record.json` and `record.csv` are made from the rounds.

    Args:
        model: not fitted yet.
        batches: data by name, in order of time: a mapping, or pairs. After a restart, names and
            data must be the same.
        folder: for the results; `rounds/` in it is a `History`.
        guide, components, executor: as for `fit`, which learns the first batch; `update` learns
            the others.
        tests: held-out data by name, scored after every round. After a restart there may be new
            ones.
        columns, options, changes: as for `fit`.
        keep, grow, again: as for `Posterior.update`.
        distill: texts to make a student with after every round, as for `Posterior.update`. Metrics
            are those of the posterior. If there is no student, the round is not saved either.
        promise: arguments of `Posterior.promise`, such as {"calibration": rows, "error": 0.1}, to
            make a promise after every round. The next batch tells whether it holds
            (`decisions.watching.watched`). The rows must be in no batch.
        progress: show a progress bar; by default as `options` say.

    Returns:
        The last posterior; `Record.of` makes the table of all rounds from it.

    Raises:
        BusyError: another stream is writing into the folder.
        ConfigError: the folder holds other rounds than these, or rounds under another prior, of
            another guide, of another number of components, or of data that were read otherwise; or
            they were scored on other rows of a test.
        DataError: a batch or a test cannot be used, or a batch is the same as an earlier one.
        GuideError: a point guide, which cannot be a prior, or one that cannot `grow`.
        PriorError: `keep` has no closed form under the guide.
        SaveError: the model cannot be saved, for example because of a PEFT kind of your own.

    >>> import tempfile
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> weeks = {f"week {i}": tiny_examples(12, seed=i) for i in range(3)}
    >>> last = stream(tiny_model(()), weeks, tempfile.mkdtemp(), max_steps=3, progress=False)
    >>> [row["batch"] for row in Record.of(last).rows]
    ['week 0', 'week 1', 'week 2']
    """
    check_model(model)
    chosen = (options or FitOptions()).change(**changes)
    chosen = chosen if progress is None else chosen.change(progress=progress)
    tests = _named(tests)
    check_tests(model, tests, columns)
    with seeded(chosen.seed):
        made = autoguide(guide, model)
    pack(made, "guide", {})  # raises if the guide could not be saved after the round
    if grow:
        check_growing(model, made)
    if not made.centres_prior:  # else its posterior is of the form of its prior
        prior = prior_of(model, made)  # raises if it cannot be one
        forget(keep, prior, model.prior, model.sites)
    texts = None if distill is None else texts_for(model, distill, columns, chosen.seed)
    if promise is not None:
        promise = _named(promise)
        check_promise(model, promise, columns)

    def learn(last: Posterior | None, data: object) -> Posterior:
        how: Any = {"options": chosen, "executor": executor}
        if last is None:
            start: Any = {"columns": columns, "components": components}
            learnt = fit(model, guide, data, **start, **how)
        else:
            learnt = last.update(data, keep=keep, grow=grow, again=again, **how)
        learnt = learnt if texts is None else with_student(learnt, texts, chosen)
        if promise is None:
            return learnt
        try:
            return learnt.promise(**promise)
        except DataError as error:  # what was learnt counts more
            warn(f"promise: {error}; this round has none")
            return learnt

    def check_same(history: History, last: Posterior) -> None:
        check_same_stream(history, last, made.title(), components, columns, chosen, keep)

    how: Any = {"tests": tests, "grow": grow, "progress": chosen.progress}
    return prequential(model, learn, batches, folder, check_same=check_same, **how)


def prequential(
    model: Model,
    learn: Learner,
    batches: Batches,
    folder: str | Path,
    *,
    tests: Mapping[str, object] | None = None,
    grow: bool = False,
    samples: int | None = None,
    drift: bool = True,
    progress: bool = True,
    check_same: Callable[[History, Posterior], None] | None = None,
) -> Posterior:
    """`stream` with any way of learning.

    Args:
        model: as it is before the first round.
        learn: a function of the last posterior (None in the first round) and a batch, which
            returns the next posterior; its lineage extends the last one's.
        batches, folder, tests, grow, progress: as for `stream`.
        samples: draws of each prediction of a test, as for `predict`; without `drift` also of a
            batch.
        drift: compare batches with what was expected (`assess`). Without it the guide may be a
            point estimate.
        check_same: is called with the history and the last posterior in it, to refuse it before
            anything is learnt.

    >>> import tempfile
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> weeks = {f"week {i}": tiny_examples(12, seed=i) for i in range(2)}
    >>> def learn(last, data):  # under the first prior in every round, started at the last round
    ...     if last is None:
    ...         return fit(tiny_model(()), "normal", data, max_steps=3, progress=False)
    ...     return last.update(data, keep=0.0)
    >>> folder = tempfile.mkdtemp()
    >>> last = prequential(tiny_model(()), learn, weeks, folder, drift=False, progress=False)
    >>> len(last.lineage), last.report.keep
    (2, 0.0)
    """
    pack_model(model, {})  # which refuses what could not be saved
    tests = _named(tests)
    folder = Path(folder)
    history = History(folder / ROUNDS)
    pairs: Iterable[Any] = list(batches.items()) if isinstance(batches, Mapping) else batches
    total = len(pairs) if isinstance(pairs, Sized) else None
    with history.writing(), cut_once(), bars(progress), work("stream", total, at_once=True) as bar:
        posterior = last_round(history, model)
        if posterior is not None and check_same is not None:
            check_same(history, posterior)
        done = () if posterior is None else posterior.lineage
        count = 0
        for count, pair in enumerate(pairs, 1):
            bar.name(f"round {count}{f' of {total}' if total else ''}")
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                got = f"batches: number {count} is a {type(pair).__name__}"
                raise ConfigError(f"{got}; expected a pair of a name and data")
            name, data = str(pair[0]), _reusable(pair[1])  # dates and numbers are names too
            if count <= len(done):
                assert posterior is not None
                check_same_batch(posterior, count - 1, name, data)
                if count == len(done):
                    check_same_tests(posterior, tests)
                    last = posterior
                    if not last.report.tests:  # as after an interrupt
                        posterior = _scored(last, name, data, tests, samples)
                    if posterior is not last:
                        posterior.save(history.folders[last.report.id], overwrite=True)
                bar.next()
                continue
            metrics: dict[str, float] = {}
            if posterior is not None:
                with about(f"batches: {name!r}"):
                    posterior = with_outputs_for(posterior, data, grow)
                    examples = posterior.encode(data)
                with work(share=0):
                    metrics = _before(posterior, examples, samples, drift)
            with about(f"batches: {name!r}"):
                learnt = learn(posterior, data)
            if not isinstance(learnt, Posterior) or len(learnt.lineage) != count:
                raise ConfigError(
                    f"learn: got {shown(learnt)} in round {count}; expected a bh.Posterior whose "
                    "lineage is that of the last one and a report more"
                )
            posterior = _noted(learnt, name, metrics)
            try:
                posterior = _scored(posterior, name, data, tests, samples)
            finally:  # after Ctrl-C what was learnt, to be scored later
                history.add(posterior)
            Record.of(posterior).save(folder)
            bar.next()
        if posterior is None:
            raise DataError("batches is empty: at least one is needed")
        if len(posterior.lineage) > count:
            raise ConfigError(
                f"folder: {folder} holds {len(posterior.lineage)} rounds, of more batches than the "
                f"{count} given"
            )
        Record.of(posterior).save(folder)
        return posterior


def _noted(posterior: Posterior, name: str, metrics: dict[str, float]) -> Posterior:
    """The posterior with the name of its batch and more metrics beside those of the learner."""
    report = posterior.report
    return posterior.with_report(name=name or report.name, metrics=report.metrics | metrics)


def _scored(
    posterior: Posterior, name: str, data: object, tests: Mapping[str, object], samples: int | None
) -> Posterior:
    """The posterior that has just learnt a batch, with its scores on tests in the report."""
    tested: dict[str, Examples] = {}
    for test, rows in tests.items():
        with about(f"tests: {test!r}"):
            if not unknown_labels(posterior, rows):  # which a later round learns
                tested[test] = posterior.encode(rows)
    if not tested:
        return posterior
    scores: dict[str, float] = {}
    with work(share=0):
        for test, examples in tested.items():
            # Of rows that were learnt it is said below.
            alone = posterior.replace(student=None, learnt_rows=None)
            metrics = alone.evaluate(examples, samples)
            scores |= {TEST + test: _score(metrics), TEST_NLL + test: metrics["nll"]}
    learnt = posterior.encode(data)
    if copies := sum(shared(learnt, rows) for rows in tested.values()):
        warn(
            f"batches: {name!r} has the texts of {copies} test rows (case and spaces aside), whose "
            "scores are too good from now on"
        )
    if name in tested:  # `update` is to refuse the whole batch, with these rows
        whole = learnt.concat(tested[name]).fingerprint
        posterior = posterior.with_report(data_with_held_out=whole)
    marks = {test: rows.fingerprint for test, rows in tested.items()}
    return _noted(posterior.with_report(tests=marks), name, scores)


def _before(
    posterior: Posterior, examples: Examples, samples: int | None, drift: bool
) -> dict[str, float]:
    """Metrics of predicting a batch that is not learnt yet, with those of its drift."""
    noted = {}
    if posterior.promised is not None:
        made: Any = posterior.promised.method
        method = made if made in get_args(Method) else None
        forecast = posterior.predict(examples, method=method)
        noted = watched(forecast, posterior.lineage)
    if drift:
        assessed = assess(posterior, examples)
        noted |= {f"drift/{key}": value for key, value in assessed.metrics().items()}
        forecast = assessed.forecast
    else:
        forecast = posterior.replace(student=None, novelty=None).predict(examples, samples)
    return evaluate(forecast) | standard_errors(forecast) | noted


def _named(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A mapping whose data can be read more than once."""
    return {str(name): _reusable(data) for name, data in (given or {}).items()}


def _reusable(data: object) -> object:
    """Data that can be read more than once."""
    return list(data) if isinstance(data, Iterator) else data


def _score(metrics: Mapping[str, float]) -> float:
    """Accuracy, or minus the MSE: more is better."""
    return metrics["accuracy"] if "accuracy" in metrics else -metrics["mse"]
