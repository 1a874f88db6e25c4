"""Students over rounds: `python -m tools.experiments.students`.

Domains are learnt in turn (`protocols`, "orders"). After each round a student of the posterior is
trained on texts of all domains, without their labels, and both predict the tests of the domains
learnt so far. One result file for each seed; tables are made from the files alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.data import Examples
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.posterior.posterior import Posterior

from .arms import updating
from .passes_report import likeness
from .protocols import PROTOCOLS
from .results import Run, run_all
from .stream import Encoded, setup
from .tables import OVER_SEEDS, Table, distinct

__all__ = ["distance", "students", "table"]


def students(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/students"),
    seeds: Annotated[int, typer.Option(help="Orders 0 to SEEDS - 1.", min=1)] = 1,
    rows: Annotated[int, typer.Option(help="Rows of each domain that are learnt.")] = 100,
    test: Annotated[int, typer.Option(help="Rows of each test.")] = 100,
    texts: Annotated[int, typer.Option(help="Unlabelled texts of each domain.")] = 125,
    components: Annotated[int, typer.Option(help="Of the posterior.")] = 5,
) -> None:
    """Run the orders, and print how far the students are from their posteriors."""
    setting = {"rows": rows, "test": test, "texts": texts, "components": components}
    runs: list[Run] = [(seed,) for seed in range(seeds)]
    backbone = minilm()

    def result(seed: int) -> dict[str, Any]:
        stream = Encoded(PROTOCOLS["orders"].read(data, seed, rows, test + texts), backbone)
        learn = updating(components)(setup(stream, backbone, "bh_peft", seed))
        apart = [
            (part.subset(range(test)), part.subset(range(test, test + texts)))
            for part in stream.tests.values()
        ]
        tests, unlabelled = ([*parts] for parts in zip(*apart, strict=True))
        pool = unlabelled[0].concat(*unlabelled[1:])
        posterior, rounds = None, []
        for number, batch in enumerate(stream.batches.values(), 1):
            posterior = learn(posterior, batch)
            student = posterior.distill(pool, progress=False)
            rounds.append(distance(student, tests[0].concat(*tests[1:number])))
        return {"seed": seed, "rounds": rounds}

    typer.echo(table(run_all(out, runs, setting, result)).markdown())


def distance(posterior: Posterior, examples: Examples) -> dict[str, float]:
    """How far the student of a posterior is from it."""
    with warnings.catch_warnings(action="ignore"):
        exact: Any = posterior.predict(examples, method="exact")
        student: Any = posterior.predict(examples, method="student")
    return {
        "nll of the components": exact.nlls().mean().item(),
        "of the student minus it": (student.nlls() - exact.nlls()).mean().item(),
        **likeness(student, exact),
    }


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Means over the orders, by round."""
    records = [
        {"round": str(number), **values}
        for result in results
        for number, values in enumerate(result["rounds"], 1)
    ]
    note = (
        f"Domains in {len(results)} of their orders, {distinct(results, 'rows')} rows a round; "
        f"students of {distinct(results, 'texts')} texts of each domain. {OVER_SEEDS} Commits "
        f"{distinct(results, 'commit')}."
    )
    return Table.over_seeds("Rounds: students", ["round"], records, note)


if __name__ == "__main__":
    typer.run(spoken_errors()(quietly(students)))
