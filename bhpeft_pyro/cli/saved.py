"""Saved posteriors: what may be given beside them, opening them, and saving what was learnt."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ..data import CutWarning, Examples
from ..decisions.novelty import NONE_KNOWN
from ..errors import ConfigError
from ..forecast.metrics import compared, evaluate, scored
from ..posterior import Posterior, saving
from ..prediction.student import StudentReport
from ..streams import History
from ..streams.history import ROUNDS
from ..training.report_text import described
from .options import Saving
from .screen import command, print_json, say, show_metrics


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a posterior or a stream, or is in one, before any work is done."""
    around = [path for path in (out.absolute(), out.absolute().parent) if path.name == ROUNDS]
    if any((path.parent / "record.json").exists() for path in around):
        raise ConfigError(f"--out: {out} is among the rounds of a stream; expected another folder")
    if saving.exists(out) and not overwrite:
        raise ConfigError(f"--out: {out} holds a posterior already; --overwrite replaces it")
    if (out / ROUNDS).is_dir():
        raise ConfigError(f"--out: {out} holds a stream; expected another folder")
    check_folder(out)


def check_folder(out: Path) -> None:
    """Refuse a folder that is a file, or cannot be written into, before any work is done."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--out: {there} is a file; expected a folder, or the name of a new one")
    try:
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(f"--out: cannot write into {there}: {error.strerror}") from error


def check_inputs(out: Path, names: Sequence[str], *inputs: object) -> None:
    """Refuse a folder in which a file of one of the names would replace a file that is read."""
    read = {Path(given).resolve() for given in inputs if isinstance(given, str)}
    for name in names:
        if (out / name).resolve() in read:
            raise ConfigError(f"--out: {out / name} is the data; expected another place")


def check_file(out: Path, *suffixes: str, data: str | None = None, overwrite: bool = True) -> None:
    """Refuse a file of another kind, a folder or none around it, the data, and what is there if it
    is not to be replaced, before any work is done."""
    if out.suffix not in suffixes:
        raise ConfigError(f"--out: {out} should end in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    check_folder(out.parent)
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; expected a file, or the name of a new one")
    check_inputs(out.parent, [out.name], data)
    if out.exists() and not overwrite:
        raise ConfigError(f"--out: {out} exists already; --overwrite replaces it")


def check_novelty(posterior: Posterior, share: float | None) -> None:
    """Refuse to flag by novelty, at most a share of rows like the learnt ones, where there is none,
    or where no p-value is so small."""
    if posterior.novelty is None or not posterior.novelty.enough:
        raise ConfigError(f"--by novelty, --max-false-alarms: {NONE_KNOWN}")
    known = len(posterior.novelty.last)
    if share is not None and share * (known + 1) < 1:
        raise ConfigError(
            f"--max-false-alarms: {share:.4g} needs {math.ceil(1 / share) - 1} learnt texts, of "
            f"which there are {known}; expected {1 / (known + 1):.4g} or more"
        )


def guide_of(posterior: Posterior) -> str:
    """The name of a posterior's family, as --guide takes it."""
    guide = posterior.guides[0]
    if guide.centres_prior:
        return "laplace"
    return "delta" if guide.point else guide.title()


def folder_of(run: Path) -> Path:
    """Where a posterior is saved: the folder itself, or that of a stream's last round."""
    if saving.exists(run) or not (run.name == ROUNDS or (run / ROUNDS).is_dir()):
        return run
    history = History.of(run)
    leaves = history.leaves
    if len(leaves) > 1:
        raise ConfigError(
            f"run: {history.folder} has branches that end in {', '.join(leaves)}; expected "
            f"one of them, such as {history.folder / leaves[0]}"
        )
    return history.folders[leaves[0]] if leaves else history.folder


def open_run(run: Path, backbone: str | None, device: str) -> Posterior:
    """A saved posterior, or the last one of a stream, on its backbone or on the one given.

    If a length was asked for at the fit, it is not said of each command's texts that they are cut.
    """
    posterior = Posterior.load(folder_of(run), backbone, device=device)
    if posterior.columns.max_length is not None:
        warnings.filterwarnings("ignore", category=CutWarning)
    return posterior


def open_to_add(
    run: Path, out: Path | None, overwrite: bool, backbone: str | None, device: str
) -> tuple[Posterior, Path]:
    """The same, and where it goes when more is saved with it: --out, or there again."""
    folder = folder_of(run)
    if out is None:
        check_folder(folder)
    else:
        check_out(out, overwrite)
    return open_run(folder, backbone, device), out or folder


def reading(posterior: Posterior, text_column: str | None) -> Posterior:
    """The posterior that reads texts from another column than its training data had."""
    if text_column is None:
        return posterior
    if posterior.model.likelihood.kind == "choice":
        raise ConfigError(f"--text-column: got {text_column!r} for choices; leave it out")
    return posterior.replace(columns=replace(posterior.columns, text=text_column))


def say_dropped(before: Posterior, out: Path) -> None:
    """Say that a promise of the posterior before does not hold for what is saved."""
    if before.promised is not None:
        how = f"{command('promise', out)} LABELLED_ROWS (other rows than these)"
        say(f"note: there was a promise; {how} makes a new one")


def save_with_student(
    posterior: Posterior, texts: Examples, out: Path, **how: Any
) -> StudentReport:
    """Distil a posterior, and save it with its student."""
    posterior = posterior.distill(texts, **how)
    posterior.save(out, overwrite=True)
    assert posterior.student is not None
    say(f"{posterior.student.report}\nsaved in {out}")
    return posterior.student.report


def finish(
    posterior: Posterior,
    how: Saving,
    data: str,
    examples: Examples,
    held_out: Examples | None,
    texts: Examples | None,
    before: Posterior | None = None,
) -> None:
    """Save a posterior, and print its metrics on held-out rows, beside those of the one before.

    `data` and `examples` are all rows that were given, whether learnt or held out. Once it is
    saved, it is distilled on `texts`, if there are any.
    """
    out, whole = how.out, examples.fingerprint
    posterior = posterior.with_report(name=Path(data).name, data_with_held_out=whole)
    posterior.save(out, how.overwrite)
    shown = {"held_out": posterior} if before is None else {"before": before, "after": posterior}
    scores = {}
    if held_out is not None and examples.labels is not None:
        # All components, also of a posterior that has a student.
        forecasts = {
            name: each.replace(student=None, novelty=None).predict(held_out, how.samples)
            for name, each in shown.items()
        }
        scores = {name: evaluate(forecast) for name, forecast in forecasts.items()}
        (*_, newest), (*_, metrics) = forecasts.values(), scores.values()
        posterior = posterior.with_report(
            metrics=posterior.report.metrics | {f"held_out/{k}": v for k, v in metrics.items()},
            score=scored(newest, examples.labels),
        )
        posterior.save(out, overwrite=True)
        say(posterior.report.score)
        if before is not None:
            say(f"since the last round, on these rows: {compared(newest, forecasts['before'])}")
        say(f"next: {command('predict', out)} NEW_ROWS predicts, and flags the least certain rows")
    else:
        say(f"next: {command('evaluate', out)} LABELLED_ROWS tells how good it is")
    report = posterior.report
    say(f"{described(report)}\nsaved in {out}")
    if kept := posterior.facts.get("texts"):
        say(f"texts: {kept}")
    if how.as_json:
        facts = ("examples", "steps", "negative_elbo", "temperature", "falling", "separation")
        of_report = {name: getattr(report, name) for name in facts}
        print_json({"round": len(posterior.lineage), **of_report, **scores})
    elif held_out is not None:
        titles = {name.replace("_", " "): values for name, values in scores.items()}
        show_metrics(f"{len(held_out)} held-out rows", titles)
    if texts is not None:
        save_with_student(posterior, texts, out, seed=report.options.seed)
