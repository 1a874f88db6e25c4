"""The tables and figures of the documentation, made from the files in `docs/results` alone.

`python -m tools.experiments page` writes `docs/results/tables.md` and the figures. README and
`docs/results.md` state no number that is not in these tables; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product
from math import nan
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bhpeft_pyro.forecast import ClassForecast
from bhpeft_pyro.forecast.metrics import evaluate, mean_and_error, ood_auroc, rejection_curve
from bhpeft_pyro.plots.forecasts import STYLES

from . import circle, decisions, labels_report, new_labels, passes_report, stream_report
from .grid import stored_runs
from .outcome import Outcome
from .runs import load
from .tables import DIFFERENCES, OVER_SEEDS, Number, Table, difference, distinct

__all__ = ["RESULTS", "figures", "tables", "write"]

RESULTS = Path(__file__).parents[2] / "docs" / "results"

TASKS = {
    "news": "news-agnews",
    "OpenBookQA": "commonsense-openbookqa",
    "Social IQa": "commonsense-socialiqa",
    "tweets": "sentiment-tweets",
    "films": "sentiment-movies",
}
HEAD, TUNED, ENSEMBLE = "linear head", "fine-tuning", "ensemble of five"
ONE, DEFAULT = "one component", "five components (default)"
SCALING = " + scaling"
METHODS = {
    HEAD: "head only, deterministic",
    TUNED: "hybrid, deterministic",
    TUNED + SCALING: "hybrid, deterministic + scaling",
    ENSEMBLE: "hybrid, ensemble",
    ENSEMBLE + SCALING: "hybrid, ensemble + scaling",
    ONE: "hybrid, one component",
    DEFAULT: "hybrid, Bayesian",
}
OTHERS = {
    "mean-field guide + scaling": "hybrid, Bayesian (mean-field) + scaling",
    "MAP + scaling": "hybrid, MAP + scaling",
    "MC dropout + scaling": "hybrid, MC dropout + scaling",
}
METRICS = ("accuracy", "mse", "nll", "ece", "crps", "coverage_90")
NOVELTY = tuple(
    f"{kind} among others" for kind in ("news", "three topics", "weekly news", "films", "tweets")
)
STREAMS = {
    "orders": "Rounds: four domains in turn",
    "tweets-first": "Rounds: four domains, tweets first",
    "nyt-first": "Rounds: four domains, New York Times first",
    "orders-ratings": "Rounds: four domains in turn, with ratings",
    "questions": "Rounds: questions from two sources",
    "rounds": "Rounds of doubling size",
    "weekly": "Rounds: weekly news",
}
# Elsewhere the widths were measured by other code than the fits, or on another day.
TIMED = {"news": (2, 3, 4), "tweets": (3, 4), "films": (3, 4)}

Runs = Mapping[int, Outcome]
"""The outcomes of one method, by seed."""


@cache
def _runs(folder: Path, task: str, name: str, rows: int = 400) -> Runs:
    """What is stored of a method in "tasks"; files are read once."""
    return stored_runs(folder / "tasks", task, name, rows)


def _nll(runs: Runs) -> Number:
    return mean_and_error([evaluate(run.forecasts["test"])["nll"] for run in runs.values()])


def _losses(runs: Runs) -> dict[int, Tensor]:
    return {seed: run.forecasts["test"].nlls() for seed, run in runs.items()}


def _gap(ours: Runs, theirs: Runs) -> Number:
    return difference(_losses(ours), _losses(theirs))["nll"]


def _quality(folder: Path) -> Iterator[Table]:
    for shown, task in TASKS.items():
        records, facts = [], []
        for name, stored in METHODS.items():
            for outcome in _runs(folder, task, stored).values():
                values = evaluate(outcome.forecasts["test"])
                chosen = {metric: values[metric] for metric in METRICS if metric in values}
                records.append({"method": name, **chosen})
                facts.append(outcome.facts)
        note = f"{OVER_SEEDS} Commits {distinct(facts, 'commit')}."
        yield Table.over_seeds(f"Quality on {shown}", ["method"], records, note)


def _differences(folder: Path) -> Table:
    lines = {}
    for shown, task in TASKS.items():
        stored = {name: _runs(folder, task, of) for name, of in METHODS.items()}
        for ours in (DEFAULT, ONE):
            for rival in (HEAD, TUNED + SCALING, ENSEMBLE, ENSEMBLE + SCALING):
                pair = (_losses(stored[name]) for name in (ours, rival))
                lines[shown, ours, rival] = difference(*pair)
    note = f"The test NLL of the first method minus that of the second. {DIFFERENCES}"
    return Table.of_numbers("Differences in NLL", ["task", "method", "minus"], lines, note)


def _sorting(folder: Path) -> Table:
    """Quality of what is kept when the least certain rows are left out."""
    records = []
    for shown, task in TASKS.items():
        for name in (TUNED, ENSEMBLE, ONE, DEFAULT):
            for outcome in _runs(folder, task, METHODS[name]).values():
                test = outcome.forecasts["test"]
                by = "confidence" if isinstance(test, ClassForecast) else "total"
                kept = rejection_curve(test, by=by, fractions=[0, 0.5, 0.8])[1].tolist()
                names = ("all rows", "most certain half", "most certain fifth")
                records.append(
                    {"task": shown, "method": name, **dict(zip(names, kept, strict=True))}
                )
    note = (
        "Accuracy of news and questions, sorted by the probability of the predicted class; mean "
        f"squared error of tweets and films, sorted by total uncertainty. {OVER_SEEDS}"
    )
    return Table.over_seeds("The most certain rows", ["task", "method"], records, note)


def _strange(folder: Path) -> Iterator[Table]:
    """AUROC of total uncertainty for rows of another kind than those that were learnt."""
    names = (DEFAULT, ENSEMBLE, ONE, TUNED, HEAD)
    for task, title in (
        ("sentiment-movies", "Other sources, by models of films"),
        ("three topics", "An unseen topic, by models of three topics"),
    ):
        records = []
        for name in names:
            for seed, outcome in _runs(folder, task, METHODS[name]).items():
                test = outcome.forecasts["test"]
                record: dict[str, Any] = {"method": name}
                if task == "three topics":  # two seeds that differ too much to be averaged
                    record["seed"] = str(seed)
                for other, forecast in outcome.forecasts.items():
                    if other.startswith("to "):
                        record[other] = ood_auroc(test, forecast, by="total")
                records.append(record)
        head = [name for name in ("method", "seed") if name in records[0]]
        note = "AUROC by total uncertainty: 0.5 is chance."
        yield Table.over_seeds(title, head, records, note)


def _rivals(folder: Path) -> Table:
    """Other ways of inference, first seed."""
    lines: dict[Any, dict[str, Number]] = {}
    names = {**OTHERS, **{name: METHODS[name] for name in (TUNED + SCALING, ONE, DEFAULT)}}
    for shown in ("news", "tweets", "films"):
        stored = {name: {0: _runs(folder, TASKS[shown], of)[0]} for name, of in names.items()}
        for name, runs in stored.items():
            values = evaluate(runs[0].forecasts["test"])
            quality = values["accuracy"] if "accuracy" in values else values["mse"]
            line = {"accuracy or mse": (quality, nan), "nll": (values["nll"], nan)}
            line["the default's nll minus it"] = _gap(stored[DEFAULT], runs)
            lines[shown, name] = line
    note = (
        "Accuracy of news, mean squared error of tweets and films. One seed; standard errors over "
        "test rows."
    )
    return Table.of_numbers("Other ways of inference", ["task", "method"], lines, note)


def _by_rows(folder: Path) -> Table:
    counts = (100, 400, 2000)
    names = (HEAD, TUNED + SCALING, ONE, ENSEMBLE + SCALING, DEFAULT)
    stored = {
        (name, rows): {0: _runs(folder, TASKS["news"], METHODS[name], rows)[0]}
        for name in names
        for rows in counts
    }
    lines = {
        (name,): {f"{rows} rows": (_nll(stored[name, rows])[0], nan) for rows in counts}
        for name in names
    }
    for ours, theirs in ((ONE, TUNED + SCALING), (DEFAULT, ENSEMBLE + SCALING)):
        lines[f"{ours} minus {theirs}",] = {
            f"{rows} rows": _gap(stored[ours, rows], stored[theirs, rows]) for rows in counts
        }
    note = (
        "Test NLL on news, one seed; standard errors over test rows. Only 400 have output scales."
    )
    return Table.of_numbers("Training rows", ["method"], lines, note)


def _upper(folder: Path) -> Table:
    lines = {}
    for name in (TUNED + SCALING, ONE, ENSEMBLE + SCALING, DEFAULT):
        whole = {0: _runs(folder, TASKS["news"], METHODS[name])[0]}
        upper = _runs(folder, TASKS["news"], METHODS[name].replace("hybrid", "upper hybrid"))
        lines[name,] = {
            "upper three layers": (_nll(upper)[0], nan),
            "all six": (_nll(whole)[0], nan),
            "difference": _gap(upper, whole),
        }
    note = (
        "Test NLL on news, one seed; standard errors over test rows. Only the components of all "
        "six layers have output scales."
    )
    return Table.of_numbers("The upper layers alone", ["method"], lines, note)


def _noise_by_text(folder: Path) -> Table:
    frame = pd.read_csv(folder / "films-noise-by-text.csv", index_col="method", comment="#")
    errors = frame.filter(like=" se").rename(columns=lambda name: name.removesuffix(" se"))
    note = (
        "Three seeds. Copied from the table of the command: the files with all draws are too "
        "large for the repository."
    )
    return Table("Films with a noise scale for each text", frame[errors.columns], errors, note)


def _cost(folder: Path) -> Table:
    ways = (TUNED, ENSEMBLE, DEFAULT)  # one point, four more, the widths of all five
    lines = {}
    for shown, task in TASKS.items():
        ratios = []
        for seed in TIMED.get(shown, (1, 2, 3, 4)):
            seconds = [_runs(folder, task, METHODS[way])[seed].facts["seconds"] for way in ways]
            point, more, widths = (of["fit"] for of in seconds)
            ratios.append(1 + widths / (point + more))
        lines[shown,] = {"the default / its five fits": mean_and_error(ratios)}
    note = (
        "Processor time of the five fits and their widths over that of the five fits alone, on a "
        f"busy machine. {OVER_SEEDS}"
    )
    return Table.of_numbers("Cost of the widths", ["task"], lines, note)


def _decisions(folder: Path) -> Iterator[Table]:
    """What promises and sets are worth on the stored test rows."""
    drawn = (
        "Calibration rows are drawn with replacement from the 400 test rows, which stand for the "
        f"population: 200 times over five seeds, for sets 50 times. {OVER_SEEDS}"
    )
    promises = (
        "`broken`: share of draws for which the error of all answers is above the promised one; at "
        "most 0.1 are to be, at a confidence of 0.9. Ratings are wrong if they are more than "
        f"{decisions.TOLERANCE:g} off. {drawn}"
    )
    covered = (
        f"The worst class is that of each seed; size: classes, or units of the rating. {drawn}"
    )
    kept = partial(decisions.promise, errors=(0.05,))
    for title, made, note in (
        ("A promise of at most 5 % errors", kept, promises),
        ("Sets and intervals of 90 %", decisions.sets, covered),
    ):
        records = [
            {"task": shown, "method": name, "calibration rows": score.by, **score.values}
            for shown in ("news", "tweets")
            for name in (DEFAULT, ENSEMBLE + SCALING, TUNED + SCALING)
            for outcome in _runs(folder, TASKS[shown], METHODS[name]).values()
            for score in made(outcome)
        ]
        yield Table.over_seeds(title, ["task", "method", "calibration rows"], records, note)
    yield _unlike(folder, promises)
    more = [
        {"method": name, "calibration rows": score.by, **score.values}
        for name in (ONE, TUNED + SCALING)
        for outcome in stored_runs(folder / "promise", TASKS["news"], METHODS[name], 400).values()
        for score in kept(outcome)
    ]
    note = f"On news, drawn 40 times a seed from 3,000 test rows. {OVER_SEEDS}"
    title = "A promise of at most 5 % errors, with more calibration rows"
    yield Table.over_seeds(title, ["method", "calibration rows"], more, note)


def _unlike(folder: Path, note: str) -> Table:
    """Promises with and without texts unlike the learnt ones. Of news the novelty, which no fit
    changes, is that of the runs of a linear head on the same rows."""
    heads = stored_runs(folder / "novelty", "news among others", METHODS[HEAD], 400)
    news = {}
    for seed, run in _runs(folder, TASKS["news"], METHODS[DEFAULT]).items():
        test, read = run.forecasts["test"], heads[seed].forecasts["test"]
        assert torch.equal(test.observed(), read.observed())
        news[seed] = Outcome(run.facts, {"test": replace(test, novelty=read.novelty)})
    tweets = stored_runs(folder / "unlike", TASKS["tweets"], METHODS[ONE], 400)
    records = []
    for shown, name, runs in (("news", DEFAULT, news), ("tweets", ONE, tweets)):
        for run in runs.values():
            test = run.forecasts["test"]
            for unlike, known in (
                ("for people", test),
                ("answered too", replace(test, novelty=None)),
            ):
                columns = {"task": shown, "method": name, "unlike texts": unlike}
                records += [
                    {**columns, "calibration rows": score.by, **score.values}
                    for score in decisions.promise(Outcome(run.facts, {"test": known}), (0.05,))
                ]
    title = "A promise of at most 5 % errors, where texts unlike the learnt ones are for people"
    return Table.over_seeds(
        title, ["task", "method", "unlike texts", "calibration rows"], records, note
    )


def _novelty(folder: Path) -> Iterator[Table]:
    """How well novelty, which no fit changes, tells texts of other kinds from the learnt one."""
    novel = "AUROC of their novelty"
    for title, value, rows in (
        (novel, "AUROC novelty", 400),
        ("AUROC of the total uncertainty of a linear head", "AUROC total", 400),
        ("share flagged where 5 % of false alarms are allowed", "flagged", 400),
        (f"{novel} after 100 rows", "AUROC novelty", 100),
        ("share flagged after 100 rows", "flagged", 100),
    ):
        note = (
            f"After {rows} rows of each kind; `false alarms` is what is flagged of other rows of "
            f"the learnt kind. Fits of a linear head. {OVER_SEEDS}"
        )
        records = []
        for task in NOVELTY:
            runs = stored_runs(folder / "novelty", task, METHODS[HEAD], rows)
            for outcome in runs.values():
                scores = {score.table: score.values for score in decisions.novelty(outcome)}
                others = {
                    name.removeprefix(f"{task}, ").removeprefix("to "): values[value]
                    for name, values in scores.items()
                    if value in values
                }
                records.append({"learnt": task.removesuffix(" among others"), **others})
        title = f"Texts of other kinds, {title}"
        yield Table.over_seeds(title, ["learnt"], records, note)


def _rounds(folder: Path, protocol: str) -> list[dict[str, Any]]:
    return stream_report.stored_runs(folder / "stream", protocol)


def tables(folder: Path = RESULTS) -> list[Table]:
    """All tables of the page, from the stored files."""
    costs = json.loads((folder / "stream" / "orders.cost.json").read_text())
    return [
        _differences(folder),
        *_quality(folder),
        _sorting(folder),
        *_strange(folder),
        *_decisions(folder),
        *_novelty(folder),
        _rivals(folder),
        _noise_by_text(folder),
        _by_rows(folder),
        _upper(folder),
        _cost(folder),
        *passes_report.tables(folder, TASKS),
        *(
            table
            for protocol, title in STREAMS.items()
            for table in stream_report.tables(_rounds(folder, protocol), title)
        ),
        stream_report.costs(costs["cost"]),
        new_labels.table(load(folder / "new-labels", product(range(5), new_labels.ARMS))),
        circle.table(load(folder / "circle", product(range(5), circle.ARMS))),
        *labels_report.tables(
            [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
        ),
    ]


def text(folder: Path = RESULTS) -> str:
    """The tables as one page of Markdown."""
    head = (
        "# Tables of the results\n\nMade by `python -m tools.experiments page` from the files "
        "beside this one; [results](../results.md) says what they mean. Do not edit."
    )
    return "\n\n".join([head, *(table.markdown() for table in tables(folder))]) + "\n"


def figures(folder: Path = RESULTS) -> dict[str, Figure]:
    """The figures by their paths in the folder."""
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    percent = range(0, 100, 10)
    for name, (colour, marker) in zip((TUNED, ENSEMBLE, ONE, DEFAULT), STYLES, strict=False):
        tests = [
            run.forecasts["test"] for run in _runs(folder, TASKS["tweets"], METHODS[name]).values()
        ]
        shares = [share / 100 for share in percent]
        kept = torch.stack(
            [rejection_curve(test, by="total", fractions=shares)[1] for test in tests]
        )
        error = kept.std(0) / len(kept) ** 0.5
        look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 2, "elinewidth": 0.8}
        ax.errorbar(percent, kept.mean(0), error, label=name, **look)
    ax.set(xlabel="least certain tweets left out (%)", ylabel="mean squared error of those kept")
    ax.set_title("five seeds, with standard errors", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return {
        "tasks/tweets-rejection.png": figure,
    }


def write(folder: Path = RESULTS) -> None:
    """Write the tables and the figures beside the stored files."""
    (folder / "tables.md").write_text(text(folder))
    for path, figure in figures(folder).items():
        figure.savefig(folder / path, dpi=110)
        plt.close(figure)
