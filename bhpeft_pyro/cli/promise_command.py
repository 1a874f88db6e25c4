"""`bhpeft promise`: which texts are answered, so that few of the answers are wrong."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .screen import command, say


def promise(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    error: options.Error = None,
    confidence: Annotated[
        Any,
        options.share_option(
            "The probability that the promise is kept, over random draws of the rows."
        ),
    ] = "90%",
    tolerance: options.Tolerance = None,
    max_share_to_people: Annotated[
        Any,
        options.share_option(
            "Leave at most this share of texts to people, instead of --error: the error that can "
            "be promised then follows.",
            "none",
        ),
    ] = None,
    method: options.Method = None,
    text_column: options.TextColumn = None,
    out: options.OtherOut = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Promise that few answers are wrong: bhpeft predict then says which texts it answers.

    DATA are labelled rows like the texts to come, preferably some hundreds, drawn at random. Rows
    that were learnt or held out are left out. To promise 5% with confidence 90%, at least 45 are
    needed.

    The promise is for this round alone. bhpeft update drops it, and so does bhpeft distill.

    Examples:
        bhpeft promise runs/reviews calibration.csv
        bhpeft promise runs/ratings calibration.csv --tolerance 0.5 --error 10%
        bhpeft promise runs/reviews calibration.csv --max-share-to-people 20%
    """
    from .saved import check_method, checked_out, folder_of, open_run, reading
    from .tables import labelled_examples

    folder = folder_of(run)
    out = checked_out(out, folder, overwrite)
    posterior = open_run(folder, backbone, device)
    check_method(posterior, method, None)
    examples = labelled_examples(reading(posterior, text_column), data)
    posterior = posterior.promise(
        examples,
        error,
        confidence,
        tolerance=tolerance,
        max_share_to_people=max_share_to_people,
        method=method,
    )
    posterior.save(out, overwrite=True)
    typer.echo(str(posterior.promised))
    say(f"saved in {out}; next: {command('predict', out)} NEW_ROWS")
