"""Students over rounds: `python -m tools.experiments.students`.

The batches of a protocol are learnt in turn. After each round a student of the posterior is trained
on texts without labels, and both predict the same rows. Domains: texts of all of them, and the
tests of those learnt so far. Weeks: the texts of the last four, and the week that follows. One
result file for each seed; tables are made from the files alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from .results import Run, check_names, run_all
from .stream import Encoded, setup
from .tables import OVER_SEEDS, Table, distinct

__all__ = ["SHOWN", "distance", "parts", "students", "table"]

_WEEKS = 4
SHOWN = {
    "orders": ("domains", "each domain"),
    "orders-ratings": ("domains with ratings", "each domain"),
    "weekly": ("weekly news", f"each of the last {_WEEKS} weeks"),
}
"""The protocols: what the titles of their tables say, and what their students learn."""


def students(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/students"),
    protocol: Annotated[str, typer.Option(help=f"One of {', '.join(SHOWN)}.")] = "orders",
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.", min=1)] = 1,
    rows: Annotated[int, typer.Option(help="Rows of a domain; of a week, at most.")] = 100,
    test: Annotated[int, typer.Option(help="Rows of each domain's test.")] = 100,
    texts: Annotated[int, typer.Option(help="Unlabelled texts of a domain, or of a week.")] = 125,
    components: Annotated[int, typer.Option(help="Of the posterior.")] = 5,
) -> None:
    """Run the rounds, and print how far the students are from their posteriors."""
    check_names("protocol", [protocol], SHOWN)
    setting = {"rows": rows, "test": test, "texts": texts, "components": components}
    runs: list[Run] = [(protocol, seed) for seed in range(seeds)]
    backbone = minilm()

    def result(protocol: str, seed: int) -> dict[str, Any]:
        stream = Encoded(PROTOCOLS[protocol].read(data, seed, rows, test + texts), backbone)
        learn = updating(components)(setup(stream, backbone, "bh_peft", seed))
        batches = list(stream.batches.values())
        posterior, rounds = None, []
        for number, (unlabelled, tested) in enumerate(parts(stream, test, texts)):
            posterior = learn(posterior, batches[number])
            student = posterior.distill(unlabelled, progress=False)
            rounds.append(distance(student, tested))
        return {"protocol": protocol, "seed": seed, "rounds": rounds}

    typer.echo(table(run_all(out, runs, setting, result), protocol).markdown())


def parts(stream: Encoded, test: int, texts: int) -> Iterator[tuple[Examples, Examples]]:
    """For each round, what its student learns and what is predicted then."""
    if stream.tests:
        tests = [part.subset(range(test)) for part in stream.tests.values()]
        others = [part.subset(range(test, test + texts)) for part in stream.tests.values()]
        for number in range(1, len(tests) + 1):
            yield _joined(others), _joined(tests[:number])
        return
    weeks = list(stream.batches.values())
    read = [week.subset(range(min(len(week), texts))) for week in weeks]
    for number, following in enumerate(weeks[1:], 1):
        yield _joined(read[max(0, number - _WEEKS) : number]), following


def _joined(parts: Sequence[Examples]) -> Examples:
    return parts[0].concat(*parts[1:])


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


def table(results: Sequence[Mapping[str, Any]], protocol: str) -> Table:
    """Means over the seeds of a protocol, by round."""
    title, source = SHOWN[protocol]
    records = [
        {"round": str(number), **values}
        for result in results
        for number, values in enumerate(result["rounds"], 1)
    ]
    note = (
        f"At most {distinct(results, 'rows')} rows a round; students of at most "
        f"{distinct(results, 'texts')} texts of {source}. {OVER_SEEDS} Commits "
        f"{distinct(results, 'commit')}."
    )
    return Table.over_seeds(f"Rounds: students, {title}", ["round"], records, note)


if __name__ == "__main__":
    typer.run(spoken_errors()(quietly(students)))
