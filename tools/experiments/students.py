"""Students over rounds: `python -m tools.experiments.students`.

Domains are learnt in turn (`protocols`, "orders"). After each round a student of the posterior is
trained on texts of all domains, without their labels, and both predict the tests of the domains
learnt so far. One result file for each seed; tables are made from the files alone.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from scipy.stats import spearmanr

from bhpeft_pyro import __version__
from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.data import Examples
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior

from .arms import GUIDE
from .protocols import PROTOCOLS
from .results import check_setting, commit, complete, file_of, load
from .stream import Encoded, setup
from .tables import OVER_SEEDS, Table, distinct

__all__ = ["rounds", "students", "table"]

_PROTOCOL = "orders"


def students(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/students"),
    seed: Annotated[list[int] | None, typer.Option(help="An order; again for more.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of each domain that are learnt.")] = 100,
    test: Annotated[int, typer.Option(help="Rows of each test.")] = 100,
    texts: Annotated[int, typer.Option(help="Unlabelled texts of each domain.")] = 125,
    components: Annotated[int, typer.Option(help="Of the posterior.")] = 5,
) -> None:
    """Run the orders, and print how far the students are from their posteriors."""
    seeds = seed or [0]
    setting = {"rows": rows, "test": test, "texts": texts, "components": components}
    for one in seeds:
        if (path := file_of(out, (one,))).exists():
            check_setting(path, json.loads(path.read_text()), setting)
    code, backbone = commit(), minilm()

    def result(one: int) -> dict[str, Any]:
        stream = Encoded(PROTOCOLS[_PROTOCOL].read(data, one, rows, test + texts), backbone)
        facts = {"seed": one, "version": __version__, "commit": code}
        common = setup(stream, backbone, "bh_peft", one)
        model, options = common.model(), common.options
        first, *others = stream.batches.values()
        parts = [each.subset(range(test, len(each))) for each in stream.tests.values()]
        unlabelled = parts[0].concat(*parts[1:])
        tests = [each.subset(range(test)) for each in stream.tests.values()]
        posterior = fit(model, GUIDE, first, components=components, **options)
        found = [rounds(posterior.distill(unlabelled, progress=False), tests[:1])]
        for number, batch in enumerate(others, 2):
            posterior = posterior.update(batch, **options)
            student = posterior.distill(unlabelled, progress=False)
            found.append(rounds(student, tests[:number]))
        return {**facts, **setting, "rounds": found}

    complete(out, [(one,) for one in seeds], result)
    typer.echo(table(load(out, [(one,) for one in seeds])).markdown())


def rounds(posterior: Posterior, tests: list[Examples]) -> dict[str, float]:
    """How far the student of a posterior is from it, on all tests together."""
    examples = tests[0].concat(*tests[1:])
    with warnings.catch_warnings(action="ignore"):
        exact: Any = posterior.predict(examples, method="exact")
        student: Any = posterior.predict(examples, method="student")
    rank = spearmanr(student.epistemic, exact.epistemic).statistic
    return {
        "nll of the components": exact.nlls().mean().item(),
        "of the student minus it": (student.nlls() - exact.nlls()).mean().item(),
        "same decision": (student.label == exact.label).double().mean().item(),
        "epistemic, rank correlation": float(rank),
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Means over the orders, by round."""
    records = [
        {"round": str(number), **values}
        for result in results
        for number, values in enumerate(result["rounds"], 1)
    ]
    note = (
        f"{len(results)} orders of the domains, {distinct(results, 'rows')} rows a round; students "
        f"of {distinct(results, 'texts')} texts of each domain. {OVER_SEEDS} Commits "
        f"{distinct(results, 'commit')}."
    )
    return Table.over_seeds("Rounds: students", ["round"], records, note)


if __name__ == "__main__":
    typer.run(spoken_errors()(quietly(students)))
