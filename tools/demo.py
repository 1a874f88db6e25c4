"""`make demo`: the package on real text, with what PyPI offers.

Film sentences first, then tweets: what a width adds to a point, and what an update keeps.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import bhpeft_pyro as bh
from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.cli.screen import table
from bhpeft_pyro.diagnostics.comparison import BASELINE, Comparison
from bhpeft_pyro.forecast.metrics import evaluate
from bhpeft_pyro.model.backbone import load_backbone
from tools.sentiment import LABELS, Round, sentiment, two_rounds

__all__ = ["Settings", "app", "run"]

SCALED, WIDE = "hybrid, scaled", "hybrid with a width"
_console = Console()


@dataclass(frozen=True)
class Settings:
    """Sizes of the demonstration; everything else is the package's default.

    Attributes:
        train: training rows of round 1 and of round 2.
        validation, test: rows of each round.
        epochs: passes over the training rows.
        exported: test rows in the ArviZ file.
        seed: of data, draws and starting values.
    """

    train: tuple[int, int] = (400, 300)
    validation: int = 100
    test: int = 400
    epochs: int = 4
    exported: int = 100
    seed: int = 0


def run(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rounds: tuple[Round, Round],
    settings: Settings,
    out: Path,
) -> tuple[Comparison, Mapping[str, bh.Posterior]]:
    """Fit, compare, update and save; returns round 1's comparison and the updated posteriors."""
    films, tweets = rounds
    options = bh.FitOptions(
        epochs=settings.epochs, seed=settings.seed, progress=_console.is_terminal
    )
    with _step("Fit a head alone, and the hybrid of LoRA, adapter and prefix: point estimates"):
        head, point = (
            bh.fit(
                bh.Model(bh.RandomPEFT(backbone, kinds, bh.Head(len(LABELS)), tokenizer)),
                "delta",
                films.train,
                validation=films.validation,
                options=options,
            )
            for kinds in (bh.presets.head_only(), bh.presets.bh_peft())
        )
    with _step("Give the hybrid a width: a Laplace approximation around that very point"):
        wide = point.widen(films.train, validation=films.validation)
        _say(str(wide.report).splitlines()[3])
    with _step(f"Compare them on {len(films.test)} {films.name} test sentences"):
        forecasts = {
            name: _classes(posterior, films.test)
            for name, posterior in (("head only", head), (BASELINE, point), (WIDE, wide))
        }
        held_out = _classes(point, films.validation)
        forecasts[SCALED], temperature = forecasts[BASELINE].tempered(held_out)
        seconds = {"head only": head, BASELINE: point, SCALED: point, WIDE: wide}
        compared = Comparison(
            forecasts, {name: each.report.seconds for name, each in seconds.items()}, {}
        )
        _show(compared, temperature)
        _doubts(forecasts[WIDE])
    with _step(f"Learn {len(tweets.train)} {tweets.name}, without a look back at the {films.name}"):
        _say("With a width the posterior is the next prior; plain fine-tuning just goes on.")
        guide = copy.deepcopy(point.guide)
        plain = bh.fit(point.model, guide, tweets.train, options=options.change(temperature=0.0))
        later = {"plain fine-tuning": plain, "posterior as prior": wide.update(tweets.train)}
        _show_rounds(rounds, {"before": wide, **later})
    with _step("Save everything"):
        wide.save(out / "posterior-1", overwrite=True)
        later["posterior as prior"].save(out / "posterior-2", overwrite=True)
        shown = tweets.test.select(range(settings.exported))
        idata = later["posterior as prior"].to_arviz(shown, samples=8, seed=settings.seed)
        idata.to_netcdf(str(out / "posterior-2.nc"))
        compared.table().to_csv(out / "table.csv")
        compared.plot().savefig(out / "plot.png", dpi=110)
        _say(f"{out} holds posterior-1/, posterior-2/, posterior-2.nc (ArviZ), table.csv, plot.png")
    return compared, later


def _classes(posterior: bh.Posterior, data: object) -> bh.forecast.ClassForecast:
    forecast = posterior.predict(data)
    assert isinstance(forecast, bh.forecast.ClassForecast)
    return forecast


def _show(compared: Comparison, temperature: float) -> None:
    made = compared.table().drop(columns="seconds")
    made = made.astype(object).where(made.notna(), None)
    table(
        "NLL less the hybrid's with its 95 % interval over test sentences; lower is better. "
        f"Scaled by a temperature of {temperature:.2f} that suits the validation rows",
        ("", *made.columns),
        list(made.itertuples(name=None)),
    )


def _doubts(forecast: bh.forecast.ClassForecast, count: int = 4) -> None:
    """The sentences about which the weights disagree most."""
    _say("Where it is least sure of itself (epistemic uncertainty, in nats):")
    assert forecast.texts is not None
    truth = forecast.observed()
    for i in forecast.flag(1.0, by="epistemic")[:count].tolist():
        label, sure = LABELS[int(forecast.label[i])], forecast.confidence[i]
        right = "right" if forecast.label[i] == truth[i] else "wrong"
        _say(f"  {forecast.epistemic[i]:.3f}: {label} ({sure:.2f}), {right}: {forecast.texts[i]}")


def _show_rounds(rounds: tuple[Round, Round], posteriors: Mapping[str, bh.Posterior]) -> None:
    rows = []
    for name, posterior in posteriors.items():
        scores = [evaluate(_classes(posterior, each.test)) for each in rounds]
        rows.append((name, *(score[metric] for score in scores for metric in ("accuracy", "nll"))))
    first, second = (each.name for each in rounds)
    table(
        f"What is kept of {first}, and what is learnt of {second}",
        ("", f"{first}: accuracy", "nll", f"{second}: accuracy", "nll"),
        rows,
    )


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
    """A point estimate, and the same with a width: MiniLM on film sentences, then on tweets."""
    settings = Settings(seed=seed)
    if small:
        sizes = {"train": (16, 16), "validation": 8, "test": 16, "epochs": 2, "exported": 4}
        settings = replace(settings, **sizes)  # type: ignore[arg-type]
    _console.rule("bhpeft_pyro: Bayesian hybrid fine-tuning of a frozen transformer")
    backbone, tokenizer = load_backbone("minilm")
    out.mkdir(parents=True, exist_ok=True)
    rounds = two_rounds(sentiment(), settings.train, settings.validation, settings.test, seed)
    for number, each in enumerate(rounds, 1):
        _say(f"Round {number}, {each}")
    if small:
        _say("A small run to see that everything works: its numbers mean nothing.")
    run(backbone, tokenizer, rounds, settings, out)
    _say(f"One seed, {settings.test} test rows a domain: another seed gives other numbers.")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(spoken_errors()(quietly(main)))

if __name__ == "__main__":
    app()
