"""What commands read and write: tables and saved posteriors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data import Examples, LabelWarning
from ..data.copies import apart, warn_of_copies
from ..data.doubts import tally
from ..data.labels import by_name
from ..data.sources import in_file, load
from ..errors import ConfigError, DataError
from ..forecast.metrics import evaluate
from ..forecast.score import Score, compared
from ..guides.registry import GUIDES
from ..model.likelihoods import Likelihood
from ..posterior import saving
from ..posterior.posterior import Posterior
from ..streams import History
from ..training.report_text import described
from .options import POINTS, Fitting
from .screen import print_json, say, show_metrics

ROUNDS = "rounds"  # in the folder of a stream


def rows_for(posterior: Posterior, source: str, labelled: bool) -> Dataset:
    """A table for a posterior, which has the columns that it was fitted to."""
    kind, columns = posterior.model.likelihood.kind, posterior.columns
    label = columns.target(kind)
    table = load(source, columns.inputs(kind))
    for column in (*columns.inputs(kind), *((label,) if labelled else ())):
        if column not in table.column_names:
            raise DataError(
                f"{source} has no column {column!r}, which this posterior was fitted to; "
                f"columns there: {', '.join(table.column_names)}"
            )
    names = posterior.columns.label_names
    first = table[0][label] if labelled and names else None
    if names and type(first) is int and by_name([first], table.features[label], names) == [first]:
        say(f"labels are numbers: 0 stands for {names[0]!r}, 1 for {names[1]!r} and so on")
    return table


def say_labels(examples: Examples, levels: int = 0) -> None:
    """How many examples each class has, or where ratings lie; of few whole numbers, what they may
    be instead."""
    if counts := tally(examples):
        say(counts)
    if levels and examples.labels is not None:
        low, high = examples.labels.min(), examples.labels.max()
        say(
            f"note: there are {levels} different ratings: intervals end at {low:g} and {high:g}. "
            "For the probability of each, use --task classes"
        )


@contextmanager
def doubting(yes: bool, data: str) -> Iterator[None]:
    """Refuse labels that look like a mistake, unless the user has agreed to them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always" if yes else "error", LabelWarning)
        try:
            yield
        except LabelWarning as doubt:
            told = str(doubt).removeprefix("data: ")
            raise DataError(
                f"{Path(data).name}: {told}; mend the labels, or learn them as they are with --yes"
            ) from doubt


def hold_out(
    rows: Dataset, hashes: Tensor, share: float, seed: int
) -> tuple[Dataset, Dataset | None]:
    """Rows to learn from, and a random share held out, without copies (rows of the same hash) in
    both; None if that is no row, or all."""
    order = np.random.default_rng(seed).permutation(len(rows))
    learnt, held_out = apart(torch.from_numpy(order), hashes, round(share * len(rows)))
    if not (len(learnt) and len(held_out)):
        return rows, None
    return rows.select(learnt.tolist()), rows.select(held_out.tolist())


def split(
    examples: Examples,
    given: float | str | None,
    seed: int,
    read: Callable[[str], Examples],
    option: str = "--validation",
) -> tuple[Examples, Examples | None]:
    """Examples to learn from, and those held out: a share, or a file that `read` encodes; None
    holds out as `fit` does."""
    if isinstance(given, str):
        try:
            with in_file(given):
                return examples, read(given)
        except DataError as error:
            raise DataError(f"{option} {'' if error.file else f'{given}: '}{error}") from error
    train, held_out = examples.hold_out(seed, given)
    if held_out is not None:
        warn_of_copies(examples)
    elif given is None:
        different = "different " if examples.copies else ""
        say(f"too few {different}rows to hold some out; {option} 20% does, and shows their metrics")
    elif given:
        rows, copies = len(examples.row_hashes), examples.copies
        where = f", and {copies} repeat another's text" if copies else ""
        raise DataError(
            f"{option}: {given:.3g} of {rows} rows is {round(given * rows)}{where}; expected "
            "another share, or 0 for none"
        )
    return train, held_out


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a posterior or a stream, before any work is done."""
    if saving.exists(out) and not overwrite:
        raise ConfigError(f"--out: {out} holds a posterior already; --overwrite replaces it")
    if (out / ROUNDS).is_dir():
        raise ConfigError(f"--out: {out} holds a stream; expected another folder")
    there = next(each for each in (out, *out.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ConfigError(f"--out: {there} is a file; expected a folder, or the name of a new one")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"--out: there is no permission to write into {there}")


def check_file(out: Path, *suffixes: str) -> None:
    """Refuse a file of another kind, or in no folder, before any work is done."""
    if out.suffix not in suffixes:
        raise ConfigError(f"--out: {out} should end in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")


def check_used(fitting: Fitting, guide: str, selects: bool) -> None:
    """Refuse options that a fit of a guide would ignore. `selects` says whether held-out rows
    choose the step of a point estimate that is kept."""
    if fitting.tau is not None and guide != "laplace":
        raise ConfigError("--tau works only with --guide laplace; leave it out")
    chosen = guide in POINTS and fitting.temperature is None and selects
    if getattr(fitting, "patience", None) is not None and chosen:
        raise ConfigError(
            f"--patience has no effect on a first {guide} fit without --temperature; leave it out"
        )


def check_samples(
    samples: int | None, guide: str, likelihood: Likelihood, predicts: bool = True
) -> None:
    """Refuse a number of draws where nothing is drawn."""
    if samples is None:
        return
    why = "" if predicts else "no rows are predicted"
    if guide == "delta":
        why = "delta is a point estimate"
    elif guide == "laplace" and likelihood.constant_noise and samples > 0:
        why = "forecasts of ratings under laplace are exact"
    if why:
        raise ConfigError(f"--samples: {why}, so nothing is drawn; leave it out")


def guide_of(posterior: Posterior) -> str:
    """The name of a posterior's family, as --guide takes it."""
    guide = posterior.components[0].guide
    return next((name for name, made in GUIDES.items() if type(guide) is made), guide.title())


def rounds_of(folder: Path) -> History:
    """The rounds in a folder, or in the folder of a stream."""
    inner = folder / ROUNDS
    return History(inner if inner.is_dir() else folder)


def open_run(folder: Path, backbone: str | None, device: str) -> Posterior:
    """A saved posterior, or the last one of a stream, on its backbone or on the one given."""
    if not saving.exists(folder) and (folder.name == ROUNDS or (folder / ROUNDS).is_dir()):
        history = rounds_of(folder)
        leaves = history.leaves
        if len(leaves) > 1:
            raise ConfigError(
                f"run: {history.folder} has branches that end in {', '.join(leaves)}; expected "
                f"one of them, such as {history.folder / leaves[0]}"
            )
        folder = history.folders[leaves[0]] if leaves else history.folder
    return Posterior.load(folder, backbone, device=device)


def finish(
    posterior: Posterior,
    out: Path,
    data: str,
    examples: Examples,
    held_out: Examples | None,
    samples: int | None,
    *,
    overwrite: bool,
    as_json: bool,
    before: Posterior | None = None,
) -> None:
    """Save a posterior, and print its metrics on held-out rows, beside those of the one before.

    `data` and `examples` are all rows that were given, whether learnt or held out.
    """
    report = posterior.report
    report.name, report.given = Path(data).name, examples.fingerprint
    posterior.save(out, overwrite)
    columns = {"held_out": posterior} if before is None else {"before": before, "after": posterior}
    scores = {}
    if held_out is not None and examples.labels is not None:
        forecasts = {name: each.predict(held_out, samples) for name, each in columns.items()}
        scores = {name: evaluate(forecast) for name, forecast in forecasts.items()}
        (*_, own), (*_, metrics) = forecasts.values(), scores.values()
        report.metrics |= {f"held_out/{name}": value for name, value in metrics.items()}
        report.score = str(Score.of(own, examples.labels))
        posterior.save(out, overwrite=True)
        say(report.score)
        if before is not None:
            say(f"since the last round, on these rows: {compared(own, forecasts['before'])}")
        say(f"next: bhpeft predict {out} NEW_ROWS predicts, and flags the least certain rows")
    else:
        say(f"next: bhpeft evaluate {out} LABELLED_ROWS tells how good it is")
    say(f"{described(report)}\nsaved in {out}")
    if as_json:
        facts = ("examples", "steps", "negative_elbo", "temperature", "unsettled")
        known = {name: getattr(report, name) for name in facts}
        print_json({"round": len(posterior.lineage), **known, **scores})
    elif held_out is not None:
        titles = {name.replace("_", " "): values for name, values in scores.items()}
        show_metrics(f"{len(held_out)} held-out {held_out.unit}", titles)
