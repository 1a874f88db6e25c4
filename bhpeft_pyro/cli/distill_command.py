"""`bhpeft distill`: one network that predicts in place of all components."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from . import options
from .screen import print_json


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
    from .saved import checked_out, folder_of, open_run, reading, save_with_student, say_dropped
    from .tables import rows_for

    folder = folder_of(run)
    out = checked_out(out, folder, overwrite)
    posterior = open_run(folder, backbone, device)
    reader = reading(posterior, text_column)
    rows = rows_for(reader, data, labelled=False)
    texts = read_texts(reader, rows, data)
    how = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    report = save_with_student(posterior, texts, out, **how)
    say_dropped(posterior, out)
    if as_json:
        print_json(asdict(report))
