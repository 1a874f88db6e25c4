"""`bhpeft predict` and `promise`: answers with their uncertainty, and a limit on wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from ..base.names import Method
from ..base.values import Inside, valid
from ..errors import ConfigError, DataError
from . import options
from .screen import command, say, table

if TYPE_CHECKING:
    import pandas as pd

    from ..decisions.promises import Promise
    from ..posterior import Posterior
    from ..prediction.predict import AnyForecast

_OF_CLASSES = ("variance", "confidence")
_FLAG = 0.1  # the share of the rows that are flagged by default
_WIDE = 100  # characters: in less, fewer columns are shown
_MANY = 0.2  # of the texts unlike what was learnt; 5 % are by chance
_ADDED = re.compile(  # columns of predictions
    r"prediction|probability|sd|epistemic|aleatoric|novelty|reason|nearest|answered|flagged"
    r"|(lower|upper|set|from|to)_\d\d?(\.\d+)?"
)


_By = Literal["total", "epistemic", "aleatoric", "variance", "confidence", "novelty"]


def predict(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    flag: Annotated[
        Any, options.share_option("Flag this share of the rows, the least certain.", "10%")
    ] = None,
    by: Annotated[
        _By,
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
    encoding: options.Encoding = None,
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
    the prediction is the list of the labels that are more probable than not. Novelty is a p-value,
    small for rows unlike the learnt ones; the reason is the main one to doubt the prediction, empty
    if there is none. The last column says which rows are flagged.

    After bhpeft promise, the column answered says which rows are answered; the others are for
    people. Without a promise it is empty.

    Examples:
        bhpeft predict runs/reviews new.csv --flag 10%
        bhpeft predict runs/reviews new.jsonl --flag 5% --by epistemic --out for-review.csv
        bhpeft predict runs/reviews new.csv --max-false-alarms 5%
    """
    from ..data.encoding import cut_once
    from ..decisions.sets import check_coverage
    from ..forecast.base import way_in_words
    from . import saved, tables

    by = _order(flag, by, max_false_alarms)
    out = out or _beside(data)
    saved.check_file(out, ".csv", ".jsonl", data=data, overwrite=overwrite)
    posterior = saved.reading(saved.open_run(run, backbone, device), text_column)
    if coverage is not None:
        of_promise = check_coverage(posterior.promised, valid(Inside, "coverage", coverage)).method
        # None for draws of the weights, which are no method to ask for.
        method = method or next((name for name in get_args(Method) if name == of_promise), None)
    single = len(posterior.components) == 1
    if single and saved.guide_of(posterior) == "delta" and by in ("epistemic", "variance"):
        raise ConfigError(f"--by: got {by!r}, of which a point estimate has none; expected total")
    if by == "novelty":
        saved.check_novelty(posterior, max_false_alarms)
    rows = tables.rows_for(posterior, data, encoding)

    def forecast_of(some: pd.DataFrame) -> AnyForecast:
        examples = posterior.model.encode_texts(some, posterior.columns)
        return posterior.predict(examples, samples, method=method, seed=draw_seed)

    with cut_once():
        forecast, good = _of_good_rows(rows, forecast_of, skip_bad)
    answers = forecast.table(flag or _FLAG, by, coverage).set_index(good)
    if max_false_alarms is not None:
        answers["flagged"] = forecast.unlike(max_false_alarms).numpy()
    _write_beside(rows, answers, posterior, out)
    order = "the most unlike what was learnt"
    if by != "novelty":
        order = f"the least certain by {by}{' uncertainty' * (by not in _OF_CLASSES)}"
    limit = f": of rows like the learnt ones at most {max_false_alarms or 0:.4g}"
    flagged = f"{answers['flagged'].sum()} flagged ({order}{limit * bool(max_false_alarms)})"
    cost = way_in_words(forecast.method, forecast.passes)
    say(f"{len(rows)} row{'s' * (len(rows) != 1)}, {flagged}; {cost}; written to {out}")
    _say_answered(forecast, posterior.promised)
    if show:
        _show_first(rows, forecast, answers, by, order, show)


def _order(flag: float | None, by: _By, max_false_alarms: float | None) -> _By:
    """What rows are ranked by: novelty, if false alarms are limited."""
    for name, share in (("--flag", flag), ("--max-false-alarms", max_false_alarms)):
        if share == 0:
            raise ConfigError(f"{name}: 0 flags no row; expected a share above 0")
    if max_false_alarms is None:
        return by
    if flag is not None or by not in ("total", "novelty"):
        other = "--flag" if flag is not None else "--by"
        raise ConfigError(f"--max-false-alarms: it takes the place of {other}; leave one out")
    return "novelty"


def _write_beside(
    rows: pd.DataFrame, answers: pd.DataFrame, posterior: Posterior, out: Path
) -> None:
    """Write the rows with the predictions beside them; an earlier prediction is left out."""
    from ..data.table import write

    columns, kind = posterior.columns, posterior.model.likelihood.kind
    own = _own_columns([*rows], {*columns.inputs(kind), columns.target(kind)})
    added = answers.drop(columns=["text", "label"], errors="ignore")
    if same := [name for name in added if name in own]:
        file = rows.attrs["file"] or "the table"
        say(f"note: {file} has its own {', '.join(same)}; these are written as predicted_...")
    added = added.rename(columns={name: f"predicted_{name}" for name in same})
    write(out, rows[own].join(added.astype(object)))


def _show_first(
    rows: pd.DataFrame,
    forecast: AnyForecast,
    answers: pd.DataFrame,
    by: str,
    order: str,
    count: int,
) -> None:
    """A table of the first rows in this order."""
    from rich.console import Console

    # Not the probabilities of each of several labels, nor what the reason is taken from.
    unseen = {"epistemic", "aleatoric", "label", "flagged"}
    if narrow := Console().width < _WIDE:  # the text needs the room
        unseen |= {"lower_90", "upper_90", "nearest", "answered"}
        unseen.add("reason" if by == "novelty" else "novelty")
    if forecast.answered is None:
        unseen.add("answered")
    unseen -= {by}
    if isinstance(answers["prediction"].iloc[0], list):
        unseen.add("probability")
    first = answers.iloc[forecast.flag(1.0, by)[:count].tolist()]
    shown = first.drop(columns=[*unseen & {*answers}])
    shown["text"] = [" ".join(text.split()) for text in shown.pop("text")]
    file, unit = rows.attrs["file"], rows.attrs["unit"]
    shown.insert(0, unit, first.index)
    where = f"{unit}s as in {file}" if file else "rows count from 0"
    if narrow:
        shown = shown.rename(columns={"probability": "prob."})
    lines = [*map(list, shown.itertuples(index=False))]
    table(f"{order.capitalize()} first; {where}", [*shown], lines)


def _say_answered(forecast: AnyForecast, promise: Promise | None) -> None:
    """How many rows are answered, how many are for people and why, and what is promised."""
    from ..decisions.promises import left_in_words

    if promise is None:
        say("nothing is promised, so that no row is answered; bhpeft promise makes a promise")
        return
    promised, answered = forecast.promised, forecast.answered
    if promised is None or answered is None:
        say(
            f"note: nothing is promised of these: the promise is for --method {promise.method}, "
            "without other options that change predictions"
        )
        return
    unlike = None if forecast.novelty is None else forecast.unlike()
    left = 0 if unlike is None or promised.answer_unlike else int(unlike.sum())
    count, yes = len(forecast), int(answered.sum())
    rest = f", for people: {left_in_words(count, yes, left)}" if yes < count else ""
    say(f"{yes} of {count} answered{rest}; promised: {promised.in_short}")
    if unlike is not None and unlike.double().mean() > _MANY:
        share = f"{unlike.double().mean():.0%} of the rows are unlike what was learnt"
        say(f"note: {share} (5% by chance): they are not like the calibration rows")


def _of_good_rows(
    rows: pd.DataFrame, forecast_of: Callable[[pd.DataFrame], AnyForecast], skip_bad: bool
) -> tuple[AnyForecast, pd.Index[int]]:
    """The forecast of the rows, without those that are refused if these are to be skipped, and
    the numbers of the rows that it is of."""
    from ..data.columns import FILL_IN
    from ..data.table import numbered

    bad: dict[int, str] = {}
    left_out: DataError | None = None
    while not rows.empty:
        try:
            with numbered(rows):
                forecast = forecast_of(rows)
        except DataError as error:
            if not error.rows:
                raise
            if not skip_bad:
                raise DataError(f"{error}; or give --skip-bad") from error
            refused = rows.index[[*error.rows]]
            bad |= dict.fromkeys(refused, error.problem)
        else:
            if left_out is not None:
                count = "1 row has" if len(bad) == 1 else f"{len(bad)} rows have"
                say(f"note: {count} no prediction: {left_out}")
            return forecast, rows.index
        rows = rows.drop(index=refused)
        problem = bad[min(bad)].removesuffix(FILL_IN)
        file, unit = rows.attrs["file"], rows.attrs["unit"]
        left_out = DataError.of_rows(file, sorted(bad), problem, unit)
    assert left_out is not None
    raise left_out


def _own_columns(names: list[str], read: set[str]) -> list[str]:
    """The columns of a table without those of an earlier prediction, which follow its own; those
    that are `read` stay wherever they are."""
    if not {"prediction", "epistemic", "flagged"} <= {*names}:
        return names
    first = "predicted_prediction" if "predicted_prediction" in names else "prediction"
    start = names.index(first)
    later = [
        name
        for name in names[start:]
        if name in read or not _ADDED.fullmatch(name.removeprefix("predicted_"))
    ]
    return names[:start] + later


def _beside(data: str) -> Path:
    path = Path(data)
    if not path.is_file():  # it is on the hub
        return Path("predictions.csv")
    suffix = ".jsonl" if path.suffix.lower() in (".json", ".jsonl") else ".csv"
    return path.with_name(f"{path.stem}-predictions{suffix}")


def promise(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    error: options.Error = None,
    confidence: Annotated[
        Any,
        options.share_option(
            "The probability that the promise is kept, over random draws of the rows."
        ),
    ] = "90%",
    tolerance: options.Tolerance = None,
    max_share_to_people: Annotated[
        Any,
        options.share_option(
            "Leave at most this share of texts to people, instead of --error: the error that can "
            "be promised then follows.",
            "none",
        ),
    ] = None,
    answer_unlike: Annotated[
        bool,
        typer.Option(
            "--answer-unlike",
            help="Answer rows unlike what was learnt too. By default people take them.",
        ),
    ] = False,
    method: options.Method = None,
    text_column: options.TextColumn = None,
    encoding: options.Encoding = None,
    out: options.OtherOut = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Promise that few answers are wrong: bhpeft predict then says which texts it answers.

    DATA are labelled rows like the texts to come, preferably some hundreds, drawn at random. Rows
    that were learnt or held out are left out. To promise 5% with confidence 90%, at least 45 are
    needed.

    The promise is for this round alone. bhpeft update drops it, and so does bhpeft distill.

    Examples:
        bhpeft promise runs/reviews calibration.csv
        bhpeft promise runs/ratings calibration.csv --tolerance 0.5 --error 10%
        bhpeft promise runs/reviews calibration.csv --max-share-to-people 20%
    """
    from . import saved, tables

    posterior, out = saved.open_to_add(run, out, overwrite, backbone, device)
    reader = saved.reading(posterior, text_column)
    examples = reader.encode(tables.labelled_for(reader, data, encoding))
    posterior = posterior.promise(
        examples,
        error,
        confidence,
        tolerance=tolerance,
        max_share_to_people=max_share_to_people,
        method=method,
        answer_unlike=answer_unlike,
    )
    posterior.save(out, overwrite=True)
    typer.echo(str(posterior.promised))
    assert posterior.promised is not None
    following = f"{command('predict', out)} NEW_ROWS"
    if posterior.promised.threshold is None:
        following = "label more rows, or give a larger --error, or --max-share-to-people"
    say(f"saved in {out}; next: {following}")
