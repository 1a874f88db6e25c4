"""A stream of batches: predict each first, then learn it (prequential evaluation, Dawid 1984)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ..base.checks import shown, warn
from ..base.fit_options import FitOptions
from ..base.isolation import seeded
from ..base.names import Method
from ..base.progress import bars, work
from ..base.values import Flag, Share, checked_call
from ..data import Columns, Examples, encode
from ..data.copies import shared
from ..data.encoding import CutWarning, cut_once
from ..decisions.promises import check_rows, terms
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
from ..posterior.update import has_learnt
from ..priors.any_prior import in_words
from .drift import assess
from .history import ROUNDS, History
from .record import TEST, TEST_NLL, Record

Learner = Callable[[Posterior | None, object], Posterior]
Batches = Mapping[str, object] | Iterable[tuple[str, object]]

_READING = ("text", "pair", "label", "question", "choices", "answer", "max_length")


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
    _check_tests(model, tests, columns)
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
        _check_promise(model, promise, columns)

    def learn(last: Posterior | None, data: object) -> Posterior:
        how: Any = {"options": chosen, "executor": executor}
        if last is None:
            start: Any = {"columns": columns, "components": components}
            learnt = fit(model, guide, data, **start, **how)
        else:
            _warn_of_changes(last, chosen, keep)
            learnt = last.update(data, keep=keep, grow=grow, again=again, **how)
        learnt = learnt if texts is None else with_student(learnt, texts, chosen)
        if promise is None:
            return learnt
        try:
            return learnt.promise(**promise)
        except DataError as error:  # what was learnt counts more
            warn(f"promise: {error}; this round has none")
            return learnt

    settings = {"guide": made.title(), "components": components} | _reading(columns)
    how: Any = {"tests": tests, "grow": grow, "progress": chosen.progress}
    return prequential(model, learn, batches, folder, settings=settings, **how)


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
    settings: Mapping[str, Any] | None = None,
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
        settings: by name "guide", "components", "label_names" and "columns.text" to
            "columns.max_length", which rounds in the folder must have beside those of the model.

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
        posterior = _last_round(history, model, settings or {})
        done = 0 if posterior is None else len(posterior.lineage)
        count = 0
        for count, (key, rows) in enumerate(pairs, 1):
            bar.name(f"round {count}{f' of {total}' if total else ''}")
            name, data = str(key), _reusable(rows)  # dates and numbers are names too
            if posterior is not None and count <= done:
                _check_same_batch(posterior, count - 1, name, data)
                if count == done:
                    posterior = _finished(history, posterior, name, data, tests, samples)
            else:
                with about(f"batches: {name!r}"):
                    if posterior is not None:
                        posterior = with_outputs_for(posterior, data, grow)
                    with work(share=0):
                        metrics = _before(posterior, data, samples, drift)
                    posterior = _noted(_learnt(learn, posterior, data, count), name, metrics)
                try:
                    posterior = _scored(posterior, name, data, tests, samples)
                finally:  # after Ctrl-C what was learnt, to be scored later
                    history.add(posterior)
                Record.of(posterior).save(folder)
            bar.next()
        if posterior is None:
            raise DataError("batches is empty: at least one is needed")
        if done > count:
            raise ConfigError(
                f"folder: {folder} holds {done} rounds, of more batches than the {count} given"
            )
        Record.of(posterior).save(folder)
        return posterior


def _settings(model: Model) -> dict[str, Any]:
    """What all rounds of a stream have in common, as far as a model says it."""
    likelihood = pack(model.likelihood, "", {}, own=True)
    likelihood |= likelihood.pop("options", {})
    return {
        "prior": in_words(model.prior) or None,
        "peft": model.network.kinds,
        "head": replace(model.network.head, outputs=2),
    } | {f"likelihood.{name}".removesuffix(".$"): value for name, value in likelihood.items()}


def _reading(columns: Columns) -> dict[str, Any]:
    """How rows are read. "None" is a setting too, as no value is left open."""
    reading = {f"columns.{name}": repr(getattr(columns, name)) for name in _READING}
    return reading | {"label_names": columns.label_names or ()}


def _last_round(history: History, model: Model, settings: Mapping[str, Any]) -> Posterior | None:
    """The last posterior of a single line of rounds with the same settings, if there are any."""
    leaves = history.leaves
    if len(leaves) > 1:
        raise ConfigError(
            f"folder: {history.folder} holds {len(leaves)} branches, which end in the rounds "
            f"{', '.join(leaves)}; expected a single line of rounds (`bhpeft history FOLDER --keep "
            "ROUND` keeps the one that ends in ROUND, and moves all others aside)"
        )
    if not leaves:
        return None
    folder, network = history.folder.parent, model.network
    after = _settings(model) | {**settings}
    # Later rounds have other priors; of a posterior for a prior there are no words.
    first, *_ = history.rounds.values()
    prior = after.pop("prior")
    _check_same(folder, {"prior": first.prior or prior}, {"prior": prior})
    needed = {"prior": model.prior, "likelihood": model.likelihood}
    last = history.load(leaves[0], network.backbone, tokenizer=network.tokenizer, **needed)
    guides = {"guide": last.guides[0].title(), "components": len(last.guides)}
    before = _settings(last.model) | guides | _reading(last.columns)
    names = after.get("label_names", ())
    before["label_names"] = before["label_names"][: len(names)]  # they may have grown
    _check_same(folder, before, after)
    return last


def _check_same(folder: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Compare settings; what is left open (None) is as the first round has it."""
    for name, now in after.items():
        if now is not None and before.get(name) != now:
            raise ConfigError(
                f"{name}: {folder} holds rounds with {before.get(name)}, not {now}; use the same, "
                "or another folder"
            )


def _warn_of_changes(last: Posterior, options: FitOptions, keep: float) -> None:
    """Say what may change from one round to the next, but not by mistake."""
    old, new = vars(last.report.options), vars(options)
    changed = {name: (old[name], new[name]) for name in new if name != "progress"}
    if len(last.lineage) > 1:  # the first round forgets nothing
        changed["keep"] = (last.report.keep, keep)
    noted = [f"{k}={now} (until now {was})" for k, (was, now) in changed.items() if now != was]
    if noted:
        warn(f"stream: from now on rounds are learnt with {', '.join(noted)}")


def _check_same_batch(posterior: Posterior, number: int, name: str, data: object) -> None:
    """Check that a finished round learnt this very batch."""
    report = posterior.lineage[number]
    try:
        same = report.name == name and has_learnt(report, posterior.encode(data))
    except DataError:  # such as labels that it does not know
        same = False
    if same:
        return
    other = " with other data, or with another part held out for tests"
    keep = f"; `bhpeft history FOLDER --keep {posterior.lineage[number - 1].id}` takes back what "
    raise ConfigError(
        f"batches: round {number + 1} in the folder learnt {report.name!r}, and batch "
        f"{number + 1} is {name!r}{other if report.name == name else ''}"
        f"{f'{keep}came after that round' if number else ''}"
    )


def _finished(
    history: History,
    last: Posterior,
    name: str,
    data: object,
    tests: Mapping[str, object],
    samples: int | None,
) -> Posterior:
    """The last round in the folder, scored now if an interrupt came before its scores.

    Raises:
        ConfigError: a test has other rows than those on which earlier rounds were scored.
    """
    known = {test: mark for report in last.lineage for test, mark in report.tests.items()}
    for test in known.keys() & tests.keys():
        try:
            same = last.encode(tests[test]).fingerprint == known[test]
        except DataError:  # such as labels that it does not know
            same = False
        if not same:
            raise ConfigError(
                f"tests: {test!r} has other rows than those that earlier rounds were scored on; "
                "use these, or another name"
            )
    if last.report.tests:
        return last
    scored = _scored(last, name, data, tests, samples)
    if scored is not last:
        scored.save(history.folders[last.report.id], overwrite=True)
    return scored


def _learnt(learn: Learner, last: Posterior | None, data: object, count: int) -> Posterior:
    """What a learner makes of a batch, which has to continue the last posterior."""
    learnt = learn(last, data)
    if not isinstance(learnt, Posterior) or len(learnt.lineage) != count:
        raise ConfigError(
            f"learn: got {shown(learnt)} in round {count}; expected a bh.Posterior whose lineage "
            "is that of the last one and a report more"
        )
    return learnt


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
    posterior: Posterior | None, data: object, samples: int | None, drift: bool
) -> dict[str, float]:
    """Metrics of predicting a batch that is not learnt yet, with those of its drift."""
    if posterior is None:
        return {}
    examples, noted = posterior.encode(data), dict[str, float]()
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


@contextmanager
def about(what: str) -> Iterator[None]:
    """In errors about data, say which they are."""
    try:
        yield
    except DataError as error:
        named = DataError(f"{what}: {error}")
        vars(named).update(vars(error))
        raise named from error


def encode_ahead(model: Model, data: object, columns: Columns) -> Examples:
    """Examples of batches or tests still to come, whatever their classes are: which ones the model
    will have by then is not known yet."""
    return encode(
        data,
        model.network.tokenizer,
        kind=model.likelihood.kind,
        columns=model.limited(columns, data),
    )


def _check_tests(model: Model, tests: Mapping[str, object], columns: Columns) -> None:
    """Check the tests before anything is learnt."""
    for name, data in tests.items():
        with about(f"tests: {name!r}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=CutWarning)  # given when they are used
            encode_ahead(model, data, replace(columns, label_names=None))


def _check_promise(model: Model, promise: Mapping[str, Any], columns: Columns) -> None:
    """Check the arguments of `Posterior.promise` before anything is learnt."""
    if "calibration" not in promise:
        raise ConfigError(f"promise: got {[*promise]}; expected 'calibration', labelled rows, too")
    later = ("calibration", "method", "answer_unlike")
    asked = {name: promise[name] for name in promise if name not in later}
    error, confidence, *_ = terms(model, **asked)
    with about("promise"):
        rows = encode_ahead(model, promise["calibration"], replace(columns, label_names=None))
        check_rows(len(rows), error, confidence)


def _named(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A mapping whose data can be read more than once."""
    return {str(name): _reusable(data) for name, data in (given or {}).items()}


def _reusable(data: object) -> object:
    """Data that can be read more than once."""
    return list(data) if isinstance(data, Iterator) else data


def _score(metrics: Mapping[str, float]) -> float:
    """Accuracy, or minus the MSE: more is better."""
    return metrics["accuracy"] if "accuracy" in metrics else -metrics["mse"]
