"""`bhpeft update`: the posterior of the last round is the prior of the next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .recipe import FAMILIES, POINTS, check_guide
from .screen import bars, conclude, say

__all__ = ["EXAMPLES", "update"]

EXAMPLES = (
    "bhpeft update runs/reviews tuesday.csv --out runs/reviews-2",
    "bhpeft update runs/reviews-2 wednesday.csv --out runs/reviews-3 --validation test.csv",
    "bhpeft update runs/reviews-3 thursday.csv --out runs/reviews-4 --keep 0.9 --grow",
    "bhpeft update runs/reviews-4 friday.csv --out runs/reviews-5 --guide lowrank",
)


@options.fitting()
def update(
    context: typer.Context,
    run: options.Run,
    data: options.Data,
    out: options.Out,
    config: options.Config = None,
    validation: options.Validation = "20%",
    guide: Annotated[
        str | None,
        typer.Option(
            help=f"Go on with another family of the posterior: {', '.join(FAMILIES)}.",
            show_default="the last round's",
        ),
    ] = None,
    keep: options.Keep = 1.0,
    grow: options.Grow = False,
    again: options.Again = False,
    samples: options.Samples = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Learn new data, with a saved posterior as the prior; that one stays as it is.

    How to fit, where not given, is as in the last round.
    """
    from ..guides.guide import is_point
    from ..sequential.growth import with_outputs_for
    from ..sequential.update import refuse_known
    from .runs import check_out, hold_out, naming, open_run, rows_for

    check_out(out, overwrite)
    if guide is not None:
        check_guide(guide)
    before = open_run(run, backbone, device)
    how = before.report.options.change(progress=bars(), **options.given(context))
    table = rows_for(before, data, labelled=True)
    start = with_outputs_for(before, table, grow)
    if start is not before:
        old, new = (each.columns.label_names or () for each in (before, start))
        more = (
            ", ".join(new[len(old) :]) or start.model.network.outputs - before.model.network.outputs
        )
        say(f"new classes: {more}")
    # Before rows are held out, so that all are checked now, under the numbers the file has.
    examples = start.encode(table)
    if not again:
        refuse_known(before, examples)
    train, held_out = hold_out(examples, validation, how.seed)
    if held_out is None and "patience" not in options.given(context):
        how = how.change(patience=None)  # the last round's had rows to look at
    if isinstance(held_out, str):
        with naming(held_out):
            held_out = start.encode(rows_for(start, held_out, labelled=True))
    point = is_point(before.guide) if guide is None else guide in POINTS
    say(f"round {len(before.lineage) + 1}: fitting to {len(train)} rows")
    after = start.update(
        train,
        validation=held_out if how.patience or point else None,
        options=how,
        guide=guide,
        keep=keep,
        again=again,
    )
    after.report.name = Path(data).name
    after.report.given = examples.fingerprint
    after.save(out, overwrite)
    say(f"{after.report}\nsaved in {out}")
    # The round before has no probability for a label that is new.
    conclude(after, out, held_out, samples, as_json, before if start is before else None)
