"""Sequential updating on real text: `python -m tools.experiments.stream`.

Rounds of doubling size, domains in turn, weeks of news: each batch is predicted first, then learnt,
by the posterior as the prior and by what it is to be compared with. One result file for each run,
written atomically; a run that was killed continues after its last round. Tables and plots are made
from the files alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import typer

from bhpeft_pyro import __version__
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.errors import BHPEFTError
from bhpeft_pyro.peft import presets
from bhpeft_pyro.posterior.io import digest_of

from .arms import ARMS, KEEPS, OURS
from .protocols import PROTOCOLS
from .results import Run, check_setting, commit, complete, file_of, known, load
from .stream_report import curves, matrices, tables
from .stream_runs import Encoded, cost, run, setup

__all__ = ["stream"]


def stream(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    protocol: Annotated[str, typer.Option(help=f"One of {', '.join(PROTOCOLS)}.")],
    out: Annotated[Path, typer.Option(help="Where result files and plots go.")] = Path(
        "runs/stream"
    ),
    arm: Annotated[list[str] | None, typer.Option(help="An arm; again for more.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.")] = 5,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of the last round, of a domain, or at most of a week.", min=20),
    ] = None,
    test: Annotated[int | None, typer.Option(help="Rows of a test.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over a round's data.")] = 2,
    least: Annotated[int, typer.Option(help="Steps of a round, at least.")] = 20,
    samples: Annotated[int, typer.Option(help="Draws of a Bayesian forecast.")] = 64,
    preset: Annotated[str, typer.Option(help="The PEFT weights.")] = "bh_peft",
) -> None:
    """Run the arms on a protocol; with all results there, only tables and plots are made."""
    try:
        known("protocol", [protocol], PROTOCOLS)
        known("preset", [preset], presets.__all__)
        chosen = PROTOCOLS[protocol]
        there = {**ARMS, **KEEPS} if chosen.keeps else ARMS
        arms = arm or list(there)
        known("arm", arms, there)
        sizes = (rows or chosen.rows, chosen.test if test is None else test)
        setting: dict[str, Any] = {
            "rows": sizes[0],
            "test": sizes[1],
            "epochs": epochs,
            "least": least,
            "samples": samples,
            "preset": preset,
        }
        runs = list(product([protocol], range(seeds), arms))
        backbone = minilm()
        setting["backbone"] = backbone.parent.name
        for each in (*runs, (protocol, "cost")):
            if (path := file_of(out, each)).exists():
                check_setting(path, json.loads(path.read_text()), setting)
        code = commit()  # files may change while it runs

        def encoded(seed: int) -> Encoded:
            return Encoded(chosen.read(data, seed, *sizes), backbone)

        def result(_: str, seed: int, method: str) -> dict[str, Any]:
            text = encoded(seed)
            common = setup(text, backbone, preset, epochs, least, seed)
            folder = _rounds(out, (protocol, seed, method), setting)
            found = run(there[method], common, text, folder, samples)
            facts = {"protocol": protocol, "seed": seed, "arm": method}
            facts |= {"version": __version__, "commit": code}
            return {**facts, **setting, **found}

        def ratios(*_: str) -> dict[str, Any]:
            common = setup(encoded(0), backbone, preset, epochs, least, 0)
            timed = {name: each for name, each in ARMS.items() if name.startswith(OURS)}
            facts = {"protocol": protocol, "version": __version__}
            return {**facts, **setting, "cost": cost(timed, common)}

        complete(out, runs, result)
        complete(out, [(protocol, "cost")], ratios)
    except BHPEFTError as error:
        raise typer.BadParameter(str(error)) from error
    for each in runs:
        shutil.rmtree(_rounds(out, each, setting), ignore_errors=True)
    results = load(out, runs)
    (costs,) = load(out, [(protocol, "cost")])
    typer.echo("\n\n".join(table.markdown() for table in tables(results, costs["cost"])))
    drawn = {"": curves}
    if any(name.startswith("test/") for name in results[0]["rounds"][0]):
        drawn["-matrix"] = matrices
    for name, draw in drawn.items():
        figure = draw(results)
        figure.savefig(out / f"{protocol}{name}.png", dpi=110)
        plt.close(figure)


def _rounds(out: Path, run: Run, setting: Mapping[str, Any]) -> Path:
    """Where a run keeps its rounds until it is done; another setting never continues them."""
    return file_of(out, (*run, digest_of(setting)[:12]), "rounds")


if __name__ == "__main__":
    typer.run(stream)
