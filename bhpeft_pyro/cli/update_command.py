"""`bhpeft update`: the posterior of the last round is the prior of the next."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base import names
from . import options
from .screen import say


def update(
    run: options.Run,
    data: options.Data,
    saving: options.Saving,
    fitting: options.Stopping,
    config: options.Config = None,
    guide: Annotated[
        names.GuideName | None,
        typer.Option(
            help=f"Change to another family: {options.listed(names.GuideName)}.",
            metavar="NAME",
            show_default="the last round's",
        ),
    ] = None,
    keep: options.Keep = 1.0,
    grow: options.Grow = False,
    again: options.Again = False,
    text_column: options.TextColumn = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
) -> None:
    """Learn new data, with a saved posterior as the prior; that posterior stays unchanged.

    Options of the fit that are not given are those of the last round.

    Examples:
        bhpeft update runs/reviews tuesday.csv --out runs/reviews-2
        bhpeft update runs/reviews-3 thursday.csv --out runs/reviews-4 --keep 0.9 --grow
        bhpeft update runs/reviews-4 friday.csv --out runs/reviews-5 --guide normal
    """
    from ..data.sources import in_file
    from ..posterior.distill import texts_for
    from ..posterior.growth import with_outputs_for
    from ..posterior.update import check_held_out, refuse_known
    from .saved import (
        check_out,
        check_samples,
        check_used,
        finish,
        guide_of,
        open_run,
        reading,
        say_dropped,
    )
    from .tables import doubting, labelled_examples, rows_for, say_labels, split

    check_out(saving.out, saving.overwrite)
    opened = open_run(run, backbone, device)
    before = reading(opened, text_column)
    family = guide or guide_of(before)
    check_used(fitting, family, selects=False)
    how = before.report.options.change(progress=True, **fitting.given)
    table = rows_for(before, data, labelled=True)
    with in_file(data), doubting(saving.yes, data):
        start = with_outputs_for(before, table, grow)
    if start is not before:
        old, new = (made.columns.label_names or () for made in (before, start))
        added = start.model.network.outputs - before.model.network.outputs
        say(f"new classes: {', '.join(new[len(old) :]) or added}")
    with in_file(data):  # before rows are held out, so that errors count rows as the file does
        examples = start.encode(table)
    say_labels(examples)
    texts = None
    if saving.distill is not None:
        texts = texts_for(start.model, saving.distill, start.columns, how.seed)
    if not again:
        refuse_known(before, examples)
    train, held_out = split(
        examples, saving.validation, how.seed, lambda file: labelled_examples(start, file)
    )
    check_samples(saving.samples, family, start.model.likelihood, held_out is not None)
    if held_out is None:  # the last round may have had some
        how = how.change(patience=fitting.patience)
    point = before.guide.point if guide is None else guide in options.POINTS
    used = held_out if how.patience or point else None
    if used is None:
        check_held_out(start, train, held_out)
    say(f"round {len(before.lineage) + 1}: fitting to {len(train)} {train.unit}")
    with doubting(saving.yes, data):
        after = start.update(
            train, validation=used, options=how, guide=guide, keep=keep, again=again
        )
    if text_column is not None:  # a name in this table alone
        after = reading(after, opened.columns.text)
    # The round before gives new labels no probability.
    known = before if start is before else None
    finish(after, saving, data, examples, held_out, texts, known)
    say_dropped(opened, saving.out)
