"""`bhpeft predict`: predictions with their uncertainty, the least certain flagged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from ..base.checks import INSIDE
from ..errors import ConfigError, DataError
from . import options
from .predicted_rows import Kept
from .screen import say, table

if TYPE_CHECKING:
    from ..base.progress import Work
    from ..posterior.posterior import Posterior
    from ..prediction.predict import AnyForecast

T = TypeVar("T")

_OF_CLASSES = ("variance", "confidence")
_FLAG = 0.1  # the share of the rows that are flagged by default


def predict(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    flag: Annotated[
        Any,
        options.share_option("Flag this share of the rows, the least certain.", "10%"),
    ] = None,
    by: Annotated[
        Literal["total", "epistemic", "aleatoric", "variance", "confidence", "novelty"],
        typer.Option(
            help="What to rank by: an uncertainty (variance and confidence are for classes), or "
            "novelty, how unlike the learnt texts a text is."
        ),
    ] = "total",
    max_false_alarms: Annotated[
        Any,
        options.share_option(
            "Flag the rows unlike what was learnt instead. Of rows like the learnt ones, at most "
            "this share is flagged, on average.",
            "none",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv or .jsonl file for the predictions.",
            show_default="DATA-predictions, beside DATA",
        ),
    ] = None,
    show: Annotated[int, typer.Option(help="How many rows to show on the screen.", min=0)] = 5,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Leave predictions empty for rows without text, and for rows for which the "
            "backbone's output is not finite.",
        ),
    ] = False,
    text_column: options.TextColumn = None,
    method: options.Method = None,
    samples: options.Samples = None,
    coverage: Annotated[
        Any,
        options.share_option(
            "After bhpeft promise: add sets of classes, or intervals of ratings, that contain the "
            "label for this share of texts.",
            "none",
        ),
    ] = None,
    draw_seed: options.DrawSeed = 0,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: options.OverwriteFile = False,
) -> None:
    """Predict new text, and flag the least certain predictions.

    The file has the columns of the data and the prediction. For classes these follow: its
    probability, and the epistemic and aleatoric uncertainty (nats). For ratings: the sd, the ends
    of the 90 % interval, and the epistemic and aleatoric variance. With several labels per text,
    the prediction is the list of the labels that are more probable than not. Where words have
    labels, a cell is a list for a sentence. Novelty is a p-value, small for rows unlike the learnt
    ones; the reason is the main one to doubt the prediction. The last column says which rows are
    flagged.

    After bhpeft promise, a column says which rows are answered; the others are for people.

    Rows are read, predicted and written part by part, so memory hardly grows with their number.

    Examples:
        bhpeft predict runs/reviews new.csv --flag 10%
        bhpeft predict runs/reviews new.jsonl --flag 5% --by epistemic --out for-review.csv
        bhpeft predict runs/reviews new.csv --max-false-alarms 5%
    """
    import torch

    from ..base.files import naming
    from ..base.progress import work
    from ..data.cells import write_rows
    from ..data.columns import FILL_IN
    from ..data.sources import in_file, places
    from ..decisions.sets import check_coverage
    from ..forecast.base import cost_in_words, share_of
    from ..prediction.predict import PART
    from .saved import check_file, check_method, check_novelty, guide_of, open_run, reading

    for name, share in (("--flag", flag), ("--max-false-alarms", max_false_alarms)):
        if share == 0:
            raise ConfigError(f"{name}: 0 flags no row; expected a share above 0")
    if max_false_alarms is not None and (flag is not None or by not in ("total", "novelty")):
        other = "--flag" if flag is not None else "--by"
        raise ConfigError(f"--max-false-alarms: it takes the place of {other}; leave one out")
    by = by if max_false_alarms is None else "novelty"
    out = out or _beside(data)
    check_file(out, ".csv", ".jsonl", data=data, overwrite=overwrite)
    posterior = open_run(run, backbone, device)
    kind = posterior.model.likelihood.kind
    if by in _OF_CLASSES and kind in ("labels", "rating"):
        what = "labels" if kind == "labels" else "ratings"
        raise ConfigError(f"--by: got {by!r} for {what}; expected total, epistemic or aleatoric")
    if coverage is not None:
        coverage = INSIDE("coverage", coverage)
        if posterior.promised is None:
            raise ConfigError("--coverage: it needs calibration rows; bhpeft promise first")
        if samples is not None or draw_seed or method not in (None, posterior.promised.method):
            way = f"by {posterior.promised.method}, without --samples and --seed"
            raise ConfigError(f"--coverage: the promise is for predictions {way}; leave these out")
        check_coverage(posterior.promised, coverage)
    check_method(posterior, method, samples)
    single = len(posterior.components) == 1
    if single and guide_of(posterior) == "delta" and by in ("epistemic", "variance"):
        raise ConfigError(f"--by: got {by!r}, of which a point estimate has none; expected total")
    if by == "novelty":
        check_novelty(posterior, max_false_alarms)
    posterior = reading(posterior, text_column)
    with _advising(skip_bad):
        names, total = _check_data(posterior, data, skip_bad)
    called, unit, number = places(data)
    how = {"method": method, "samples": samples, "seed": draw_seed}
    with naming(out), TemporaryFile("w+", encoding="utf-8", dir=out.parent) as file:
        kept = Kept(file, posterior.model.network.head.each_word)
        with _advising(skip_bad), in_file(data), work(parts=-(-total // PART)) as whole:
            bad = _predict(posterior, data, kept, whole, by, coverage, skip_bad, how)
        if bad:
            why = next(iter(bad.values())).removesuffix(FILL_IN)
            error = DataError.of_rows("", [*bad], why)
            error = error.placed(called, unit, number)
            if len(bad) == total:
                raise error
            count = "1 row has" if len(bad) == 1 else f"{len(bad)} rows have"
            say(f"note: {count} no prediction: {error}")
        order = torch.tensor(kept.scores).argsort(descending=True, stable=True)
        most = share_of(flag or _FLAG, len(order))
        if max_false_alarms is not None:
            most = sum(score >= 1 - max_false_alarms for score in kept.scores)
        flagged = {*order[:most].tolist()}
        shown: dict[int, Any] = dict.fromkeys(order[:show].tolist())
        every = names | kept.columns | {"flagged": None}
        write_rows(out, kept.records(names, flagged, shown), every)
    for row in shown.values():
        row["row"] = number(row["row"])
    what = f"{len(order)} words" if kept.words else f"{total} rows"
    cost = cost_in_words(kept.method, kept.passes / kept.examples)
    usual = f" (of rows like the learnt ones at most {max_false_alarms or 0:.4g})"
    by_what = by + usual * (max_false_alarms is not None)
    say(f"{what}, {len(flagged)} flagged by {by_what}; {cost}; written to {out}")
    if kept.answered is not None:
        say(f"{kept.answered} answered, the others are for people\n{posterior.promised}")
    elif posterior.promised is not None:
        say(
            f"note: nothing is promised of these: the promise is for --method "
            f"{posterior.promised.method}, without other options that change predictions"
        )
    if shown:
        some, *_ = shown.values()
        # Not the probabilities of each of several labels, nor what the reason is taken from.
        left_out = {"epistemic", "aleatoric"} - {by}
        heads = [k for k in some if not isinstance(some[k], dict) and k not in left_out]
        where = f"{unit}s as in {called}" if called else "rows count from 0"
        cells = [[row[name] for name in heads] for row in shown.values()]
        first = "Most unlike what was learnt" if by == "novelty" else f"Least certain ({by})"
        table(f"{first}; {where}", [unit, *heads[1:]], cells)


def _check_data(posterior: Posterior, data: str, skip_bad: bool) -> tuple[dict[str, None], int]:
    """The names of all columns and the number of rows, if all rows can be read, or are skipped."""
    from ..base.progress import tracked
    from ..data import CutWarning
    from ..data.sources import in_file, parts
    from ..prediction.predict import PART
    from .tables import rows_for

    model, columns = posterior.model, posterior.columns
    names: dict[str, None] = {}
    total = 0
    try:
        with warnings.catch_warnings(record=True) as given:
            read = parts(data, columns.inputs(model.likelihood.kind), PART)
            for part in tracked(read, "reading rows"):
                _of_good_rows(part, lambda rows: model.encode_texts(rows, columns), skip_bad)
                total += len(next(iter(part.values())))
                names |= dict.fromkeys(part)
    except DataError:
        with in_file(data):  # the whole table, where rows are counted from the first
            model.encode_texts(rows_for(posterior, data, labelled=False), columns)
        raise
    cuts = [warning.message for warning in given if isinstance(warning.message, CutWarning)]
    if cuts:
        say(f"note: {CutWarning(sum(cut.cut for cut in cuts), total, cuts[0].limit)}")
    return names, total


@contextmanager
def _advising(skip_bad: bool) -> Iterator[None]:
    """In errors about rows, say how to leave these out."""
    try:
        yield
    except DataError as error:
        if skip_bad or not error.rows:
            raise
        raise DataError(f"{error}; or give --skip-bad") from error


def _of_good_rows(
    part: dict[str, list[Any]], make: Callable[[dict[str, list[Any]]], T], skip_bad: bool
) -> tuple[T | None, list[int], dict[int, str]]:
    """What `make` makes of some rows, without those that it refuses if these are to be skipped: the
    numbers of the rows that are left, and what is wrong with each of the others."""
    rows, bad = [*range(len(next(iter(part.values()))))], dict[int, str]()
    while rows or not bad:  # that there are none is refused too
        some = {name: [cells[row] for row in rows] for name, cells in part.items()} if bad else part
        try:
            return make(some), rows, bad
        except DataError as error:
            if not (skip_bad and error.rows):
                raise
            bad |= {rows[i]: error.problem for i in error.rows}
            rows = [row for row in rows if row not in bad]
    return None, [], bad


def _predict(
    posterior: Posterior,
    data: str,
    kept: Kept,
    whole: Work,
    by: str,
    coverage: float | None,
    skip_bad: bool,
    how: dict[str, Any],
) -> dict[int, str]:
    """Predict a file part by part, each of which is a part of the `whole` work, and keep all rows.
    Of those that cannot be predicted, what is wrong, by their numbers."""
    from ..data import CutWarning
    from ..data.sources import parts
    from ..decisions.sets import covering
    from ..prediction.predict import PART

    model, columns, first = posterior.model, posterior.columns, 0
    read = columns.inputs(model.likelihood.kind)
    bad: dict[int, str] = {}

    def predict(some: dict[str, list[Any]]) -> AnyForecast:
        return posterior.predict(model.encode_texts(some, columns), **how)

    for given, part in zip(parts(data, None, PART), parts(data, read, PART), strict=True):
        try:
            with warnings.catch_warnings(action="ignore", category=CutWarning):  # said before
                forecast, rows, refused = _of_good_rows(part, predict, skip_bad)
        except DataError as error:
            if not error.rows:
                raise
            rows = [first + row for row in error.rows]
            raise DataError.of_rows("", rows, error.problem) from error
        bad |= {first + row: refused[row] for row in sorted(refused)}
        predicted: dict[int, Any] = {}
        if forecast is not None:
            kept.count(forecast)
            summary = forecast.summary()
            if coverage is not None:
                with warnings.catch_warnings():
                    if first:  # said of the first part
                        warnings.simplefilter("ignore")
                    summary |= covering(forecast, coverage)
            texts = forecast.texts or [""] * len(forecast)
            every = [forecast.by_row(forecast.uncertainty(by)), forecast.by_row(texts)]
            if forecast.rows is None:  # a row has one example
                every = [[[value] for value in column] for column in every]
            for row, *values, scores, words in zip(rows, *summary.values(), *every, strict=True):
                predicted[row] = dict(zip(summary, values, strict=True)), scores, words
        for row, cells in enumerate(zip(*given.values(), strict=True)):
            kept.add(dict(zip(given, cells, strict=True)), *predicted.get(row, ({}, [], [])))
        first += len(next(iter(given.values())))
        whole.next()
    return bad


def _beside(data: str) -> Path:
    path = Path(data)
    if not path.is_file():  # it is on the hub
        return Path("predictions.csv")
    suffix = ".csv" if path.suffix.lower() == ".csv" else ".jsonl"
    return path.with_name(f"{path.stem}-predictions{suffix}")
