"""`bhpeft fit`, `update` and `distill`: what is learnt from text, and saved."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Annotated

import typer

from . import options
from .screen import print_json, say


def fit(
    data: options.Data,
    saving: options.Saving,
    reading: options.Reading,
    fitting: options.Stopping,
    config: options.Config = None,
    preset: options.Preset = "bh_peft",
    guide: options.Guide = "laplace",
    components: options.Components = None,
    device: options.Device = "auto",
) -> None:
    """Fit a posterior to labelled text, and save it.

    The data have columns text and label (classes by name or number, lists of several labels, or
    real-valued ratings), or question, choices and answer.

    Examples:
        bhpeft fit reviews.csv --backbone minilm --out runs/reviews
        bhpeft fit films.jsonl --label-column stars --task ratings --out runs/films
        bhpeft fit --config fit.yaml --epochs 5
    """
    from .. import FitOptions, presets
    from .. import fit as learn
    from ..data.copies import check_apart
    from ..data.table import table as read
    from ..posterior.distill import texts_for
    from . import saved, tables

    how = FitOptions().change(**fitting.given)
    saved.check_out(saving.out, saving.overwrite)
    table = tables.LabelledTable(data, reading)
    model = table.task.model(*table.backbone(device), getattr(presets, preset)())
    examples = table.encode(model)
    columns = table.task.columns
    texts = None
    if saving.distill is not None:
        unlabelled = read(saving.distill, reading.texts, reading.encoding)
        texts = texts_for(model, unlabelled, columns, how.seed)
    train, held_out = table.split(model, examples, saving.validation, how.seed)
    # Other fits do not depend on these rows: it is enough to evaluate them at the end.
    used = held_out if how.patience or guide in options.POINTS else None
    if used is None and held_out is not None:
        check_apart(train, held_out, "validation")
    where = f"{reading.backbone}, {model.network.device}"
    say(f"fitting {preset} on {where}, to {len(train)} rows")
    posterior = learn(
        model, guide, train, validation=used, options=how, components=components, columns=columns
    )
    saved.finish(posterior, saving, data, examples, held_out, texts)


def update(
    run: options.Run,
    data: options.Data,
    saving: options.Saving,
    fitting: options.Stopping,
    config: options.Config = None,
    keep: options.Keep = 1.0,
    grow: options.Grow = False,
    again: options.Again = False,
    text_column: options.TextColumn = None,
    encoding: options.Encoding = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
) -> None:
    """Learn new data, with a saved posterior as the prior; that posterior stays unchanged.

    Options of the fit that are not given are those of the last round.

    Examples:
        bhpeft update runs/reviews tuesday.csv --out runs/reviews-2
        bhpeft update runs/reviews-3 thursday.csv --out runs/reviews-4 --keep 0.9 --grow
    """
    from ..data import CutWarning, Examples
    from ..posterior.distill import texts_for
    from ..posterior.growth import with_outputs_for
    from ..posterior.update import check_held_out, refuse_known
    from . import saved, tables

    saved.check_out(saving.out, saving.overwrite)
    opened = saved.open_run(run, backbone, device)
    warnings.filterwarnings("always", category=CutWarning)  # as a fit says it
    before = saved.reading(opened, text_column)
    how = before.report.options.change(progress=True, **fitting.given)
    rows = tables.labelled_for(before, data, encoding)
    start = with_outputs_for(before, rows, grow)
    if start is not before:
        old, new = (made.columns.label_names or () for made in (before, start))
        say(f"new classes: {', '.join(new[len(old) :])}")
    examples = start.encode(rows)
    tables.say_labels(examples)
    texts = None
    if saving.distill is not None:
        unlabelled = tables.rows_for(start, saving.distill, encoding)
        texts = texts_for(start.model, unlabelled, start.columns, how.seed)
    if not again:
        refuse_known(before, examples)

    def read(file: str) -> Examples:
        return start.encode(tables.labelled_for(start, file, encoding))

    train, held_out = tables.split(examples, saving.validation, how.seed, read)
    if held_out is None:  # the last round may have had some
        how = how.change(patience=fitting.patience)
    used = held_out if how.patience or before.point else None
    if used is None:
        check_held_out(start, train, held_out)
    say(f"round {len(before.lineage) + 1}: fitting to {len(train)} rows")
    after = start.update(train, validation=used, options=how, keep=keep, again=again)
    if text_column is not None:  # a name in this table alone
        after = saved.reading(after, opened.columns.text)
    # The round before gives new labels no probability.
    known = before if start is before else None
    saved.finish(after, saving, data, examples, held_out, texts, known)
    saved.say_dropped(opened, saving.out)


def distill(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    epochs: Annotated[int, typer.Option(help="Passes over the texts.", min=1)] = 3,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.", min=1)] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    seed: Annotated[
        int, typer.Option(help="Seed of the order of the texts and of the choice of held-out ones.")
    ] = 0,
    text_column: options.TextColumn = None,
    encoding: options.Encoding = None,
    out: options.OtherOut = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Train one network, the student, to predict texts as all components of a posterior do.

    The student predicts in one pass, and bhpeft predict uses it from then on. The texts need no
    labels; take hundreds or thousands like those to come. A fifth of them is held out, to tell how
    far the student is from the posterior. It is saved in RUN, beside the components.

    Examples:
        bhpeft distill runs/reviews unlabelled.csv
        bhpeft distill runs/reviews unlabelled.jsonl --text-column body --epochs 2
    """
    from ..posterior.distill import read_texts
    from . import saved, tables

    posterior, out = saved.open_to_add(run, out, overwrite, backbone, device)
    reader = saved.reading(posterior, text_column)
    texts = read_texts(reader, tables.rows_for(reader, data, encoding))
    how = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    report = saved.save_with_student(posterior, texts, out, **how)
    saved.say_dropped(posterior, out)
    if as_json:
        print_json(asdict(report))
