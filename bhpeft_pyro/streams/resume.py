"""Whether a stream can begin, and goes on with the model, the reading and the batches that it began
with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..base.checks import warn
from ..base.fit_options import FitOptions
from ..data import Columns, Examples, encode
from ..data.encoding import CutWarning
from ..decisions.promises import check_rows, terms
from ..errors import ConfigError, DataError
from ..model.model import Model
from ..posterior.codec import pack
from ..posterior.posterior import Posterior
from ..posterior.update import has_learnt
from ..priors.any_prior import in_words
from .history import History

_READING = ("text", "pair", "label", "question", "choices", "answer", "max_length")


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


def check_tests(model: Model, tests: Mapping[str, object], columns: Columns) -> None:
    """Check the tests before anything is learnt."""
    for name, data in tests.items():
        with about(f"tests: {name!r}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=CutWarning)  # given when they are used
            encode_ahead(model, data, replace(columns, label_names=None))


def check_promise(model: Model, promise: Mapping[str, Any], columns: Columns) -> None:
    """Refuse arguments of `Posterior.promise` that cannot work, before anything is learnt."""
    if "calibration" not in promise:
        raise ConfigError(f"promise: got {[*promise]}; expected 'calibration', labelled rows, too")
    later = ("calibration", "method", "answer_unlike")
    asked = {name: promise[name] for name in promise if name not in later}
    error, confidence, *_ = terms(model, **asked)
    with about("promise"):
        rows = encode_ahead(model, promise["calibration"], replace(columns, label_names=None))
        check_rows(len(rows), error, confidence)


def last_round(history: History, model: Model) -> Posterior | None:
    """The last posterior of a single line of rounds of this model, if there are any."""
    leaves = history.leaves
    if len(leaves) > 1:
        raise ConfigError(
            f"folder: {history.folder} holds {len(leaves)} branches, which end in the rounds "
            f"{', '.join(leaves)}; expected a single line of rounds (`bhpeft history FOLDER --keep "
            "ROUND` keeps the one that ends in ROUND, and moves all others aside)"
        )
    if not leaves:
        return None
    first, *_ = history.rounds.values()
    # Of earlier versions, and of a posterior for a prior, it is not known.
    if first.prior and (now := in_words(model.prior)):
        _check_same(history, "model", "under the prior", first.prior, now)
    network = model.network
    needed = {"prior": model.prior, "likelihood": model.likelihood}
    last = history.load(leaves[0], network.backbone, tokenizer=network.tokenizer, **needed)
    there = last.model
    _check_same(history, "model", "with PEFT weights", there.network.kinds, network.kinds)
    heads = (replace(each.network.head, outputs=2) for each in (there, model))
    _check_same(history, "model", "with a head", *heads)
    known, given = (pack(each.likelihood, "", {}, own=True) for each in (there, model))
    before, now = (plain | plain.pop("options", {}) for plain in (known, given))
    # What is left open (None) is set by the ratings of the first round.
    if any(before.get(name) != value for name, value in now.items() if value is not None):
        _check_same(history, "model", "with a likelihood", there.likelihood, model.likelihood)
    return last


def check_same_stream(
    history: History,
    last: Posterior,
    guide: str,
    components: int | None,
    columns: Columns,
    options: FitOptions,
    keep: float,
) -> None:
    """Refuse another guide, number of components or reading than that of the rounds so far; warn of
    what may change from one round to the next, but not by mistake."""
    guides, names = last.guides, columns.label_names or ()
    _check_same(history, "guide", "of", guides[0].title(), guide)
    _check_same(history, "components", "of", len(guides), components or len(guides))
    if names != (last.columns.label_names or ())[: len(names)]:  # it may have grown
        _check_same(history, "columns", "with labels", last.columns.label_names, names)
    for field in _READING:
        before, now = (f"{field}={getattr(each, field)!r}" for each in (last.columns, columns))
        _check_same(history, "columns", "read with", before, now)

    old, new = vars(last.report.options), vars(options)
    changed = {name: (old[name], new[name]) for name in new if name != "progress"}
    if len(last.lineage) > 1:  # the first round forgets nothing
        changed["keep"] = (last.report.keep, keep)
    noted = [f"{k}={now} (until now {was})" for k, (was, now) in changed.items() if now != was]
    if noted:
        folder = history.folder.parent
        warn(f"{folder}: new rounds are learnt with {', '.join(noted)}")


def _check_same(history: History, argument: str, what: str, there: Any, given: Any) -> None:
    if given != there:
        raise ConfigError(
            f"{argument}: {history.folder.parent} holds rounds {what} {there}, not {given}; use "
            f"the same {argument}, or another folder"
        )


def check_same_batch(posterior: Posterior, number: int, name: str, data: object) -> None:
    """Check that a finished round learnt this very batch."""
    report = posterior.lineage[number]
    try:
        same = report.name == name and has_learnt(report, posterior.encode(data))
    except DataError:  # such as labels that it does not know
        same = False
    if not same:
        other = hint = ""
        if report.name == name:
            other = " with other data, or with another part held out for tests"
        if number:
            keep = f"`bhpeft history FOLDER --keep {posterior.lineage[number - 1].id}`"
            hint = f"; {keep} takes back what came after that round"
        raise ConfigError(
            f"batches: round {number + 1} in the folder learnt {report.name!r}, and batch "
            f"{number + 1} is {name!r}{other}{hint}"
        )


def check_same_tests(posterior: Posterior, tests: Mapping[str, object]) -> None:
    """Check that tests have the rows on which earlier rounds were scored under their names."""
    scored = {name: mark for report in posterior.lineage for name, mark in report.tests.items()}
    for name in filter(scored.__contains__, tests):
        try:
            same = posterior.encode(tests[name]).fingerprint == scored[name]
        except DataError:  # such as labels that it does not know
            same = False
        if not same:
            raise ConfigError(
                f"tests: {name!r} has other rows than those that earlier rounds were scored on; "
                "use these, or another name"
            )
