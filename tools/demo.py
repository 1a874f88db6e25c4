"""`make demo`: the package on real text, with what PyPI offers.

Ratings of film sentences first, then of tweets: what a posterior knows of its own errors, and what
an update keeps.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas
import typer
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import bhpeft_pyro as bh
from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.cli.screen import table
from bhpeft_pyro.forecast import RatingForecast
from bhpeft_pyro.forecast.metrics import evaluate, mean_and_error, rejection_curve
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.plots.forecasts import BLUE, GREY, ORANGE
from tools.sentiment import Round, sentiment, two_rounds

__all__ = ["Settings", "app", "run"]

ONE, ENSEMBLE, POSTERIOR = "one fine-tuned model", "several, averaged", "posterior"
_COLOURS = {ONE: GREY, ENSEMBLE: ORANGE, POSTERIOR: BLUE}
_LOW, _HIGH = -4, 4  # the scale of the ratings
_console = Console()


@dataclass(frozen=True)
class Settings:
    """Sizes of the demonstration; everything else is the package's default.

    Attributes:
        train: training rows of round 1 and of round 2.
        validation, test: rows of each round.
        components: fits from different starts.
        epochs: passes over the training rows.
        seed: of data, draws and starting values.
    """

    train: tuple[int, int] = (200, 100)
    validation: int = 60
    test: int = 160
    components: int = 3
    epochs: int = 4
    seed: int = 0


Forecasts = Mapping[str, RatingForecast]


def run(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rounds: tuple[Round, Round],
    settings: Settings,
    out: Path,
) -> pandas.DataFrame:
    """Fit, predict, update and save; returns the table of all scores."""
    films, tweets = rounds
    options = bh.FitOptions(
        epochs=settings.epochs, seed=settings.seed, progress=_console.is_terminal
    )
    starts = settings.components
    with _step(f"Fine-tune LoRA, adapter and prefix on film sentences, from {starts} starts"):
        points = bh.fit(
            bh.tasks.ratings(backbone, _LOW, _HIGH, tokenizer=tokenizer),
            "delta",
            films.train,
            validation=films.validation,
            components=starts,
            options=options,
        )
    with _step("Measure how well these weights are known: a Laplace approximation around each"):
        posterior = points.widen(films.train, validation=films.validation)
    with _step(f"Rate {len(films.test)} other film sentences"):
        models = {ONE: points.components[0], ENSEMBLE: points, POSTERIOR: posterior}
        before = {name: _predict(model, films) for name, model in models.items()}
        _say("Error: mean squared, of all; certain half: of those that a model is most certain of.")
        _say("NLL: how little it expected the true ratings. In 90 %: how many its intervals hold.")
        _show("Films", before)
        _doubts(before[POSTERIOR])
    with _step(f"Learn {len(tweets.train)} tweets, without a look back at the films"):
        how = options.change(temperature=0.0)
        tuned = bh.Posterior.mixture(
            [
                bh.fit(point.model, copy.deepcopy(point.guide), tweets.train, options=how)
                for point in points.components
            ]
        )
        updated = posterior.update(tweets.train, validation=tweets.validation)
        models = {ONE: tuned.components[0], ENSEMBLE: tuned, POSTERIOR: updated}
        after = {name: _predict(model, films) for name, model in models.items()}
        news = {name: _predict(model, tweets) for name, model in models.items()}
        _show("Films, after the tweets", after)
        _show("Tweets", news)
    parts = {"films": before, "films after tweets": after, "tweets": news}
    scores = pandas.concat({part: _scores(found) for part, found in parts.items()}, names=["test"])
    with _step("Save everything"):
        posterior.save(out / "posterior-1", overwrite=True)
        updated.save(out / "posterior-2", overwrite=True)
        scores.to_csv(out / "table.csv")
        _plot(parts).savefig(out / "plot.png", dpi=110)
        _say(f"{out} holds posterior-1/, posterior-2/, table.csv; look at {out / 'plot.png'}")
    return scores


def _predict(posterior: bh.Posterior, part: Round) -> RatingForecast:
    forecast = posterior.predict(part.test)
    assert isinstance(forecast, RatingForecast)
    return forecast


def _scores(forecasts: Forecasts) -> pandas.DataFrame:
    """For each model the mean squared error of all texts and of the half that it is most certain
    of (a random half, if it is as certain of all), the NLL, and how many 90 % intervals hold."""
    rows = {}
    for name, forecast in forecasts.items():
        scores = evaluate(forecast)
        _, (certain,) = rejection_curve(forecast, fractions=[0.5])
        rows[name] = {
            "error": scores["mse"],
            "certain half": float(certain),
            "NLL": scores["nll"],
            "in 90 %": scores["coverage_90"],
        }
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _show(title: str, forecasts: Forecasts) -> None:
    scores = _scores(forecasts)
    table(title, ("", *scores.columns), list(scores.itertuples(name=None)))


def _doubts(forecast: RatingForecast, count: int = 3) -> None:
    """The sentences about whose rating the posterior is least and most certain."""
    assert forecast.texts is not None
    order, truth = forecast.flag(1.0).tolist(), forecast.observed()
    low, high = forecast.interval(0.9)
    for what, rows in (("least", order[:count]), ("most", order[: -count - 1 : -1])):
        _say(f"It is {what} certain of:")
        for i in rows:
            ends = f"{forecast.mean[i]:+.1f} ({low[i]:+.1f} to {high[i]:+.1f})"
            _say(f"  {ends}, rated {truth[i]:+.1f}: {forecast.texts[i]:.45}")


def _plot(parts: Mapping[str, Forecasts]) -> Figure:
    """The error of the films that are kept when the least certain are left out; and the errors on
    each part, with 95 % intervals."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rejected = [share / 20 for share in range(16)]
    for name, forecast in parts["films"].items():
        _, error = rejection_curve(forecast, fractions=rejected)
        left.plot([100 * share for share in rejected], error, color=_COLOURS[name], label=name)
    left.set_title("Films: the error without the least certain")
    left.set_xlabel("least certain film sentences left to a person (%)")
    left.set_ylabel("mean squared error of the others")
    left.legend(frameon=False)
    for number, (name, colour) in enumerate(_COLOURS.items()):
        forecasts = [found[name] for found in parts.values()]
        found = [mean_and_error(each.loss(each.observed())) for each in forecasts]
        errors, ends = [mse for mse, _ in found], [1.96 * se for _, se in found]
        places = [k + 0.25 * (number - 1) for k in range(len(parts))]
        bars = right.bar(places, errors, 0.22, yerr=ends, color=colour, ecolor="black")
        right.bar_label(bars, fmt="%.2f", fontsize=8, label_type="center")
    right.set_title("The error before and after the tweets were learnt")
    right.set_xticks(range(3), ["films, learnt first", "films, after the tweets", "tweets"])
    right.set_ylabel("mean squared error (95 % interval over sentences)")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@contextmanager
def _step(title: str) -> Iterator[None]:
    _console.print(f"\n[bold]{title}[/]", highlight=False)
    started = time.monotonic()
    yield
    _console.print(f"({time.monotonic() - started:.0f} s)", style="dim", highlight=False)


def _say(text: str) -> None:
    _console.print(text, markup=False, highlight=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder for all that is written.")] = Path("runs/demo"),
    small: Annotated[
        bool, typer.Option("--small", help="To see that it runs; the numbers mean nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of data, draws and starting values.")] = 0,
) -> None:
    """Ratings of film sentences, then of tweets, by MiniLM: fine-tuning beside a posterior."""
    settings = Settings(seed=seed)
    if small:
        settings = Settings((16, 16), validation=8, test=16, components=2, epochs=2, seed=seed)
    _console.rule("bhpeft_pyro: Bayesian hybrid fine-tuning of a frozen transformer")
    backbone, tokenizer = load_backbone("minilm")
    out.mkdir(parents=True, exist_ok=True)
    sizes = settings.train, settings.validation, settings.test
    rounds = two_rounds(sentiment(), *sizes, seed, rated=True)
    _say(f"Sentences with a rating from {_LOW} (negative) to {_HIGH} (positive).")
    for number, part in enumerate(rounds, 1):
        _say(f"Round {number}, {part}")
    if small:
        _say("A small run to see that everything works: its numbers mean nothing.")
    run(backbone, tokenizer, rounds, settings, out)
    _say("This is one run: another --seed gives other numbers. For tables see docs/results.md.")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(spoken_errors()(quietly(main)))

if __name__ == "__main__":
    app()
