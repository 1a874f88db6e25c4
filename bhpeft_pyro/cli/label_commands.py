"""`bhpeft queue` and `review`: what people label, in a file or in a page."""

from __future__ import annotations

import getpass
import shlex
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import BHPEFTError, ConfigError
from . import options
from .screen import command, say, table

_SHOWN = 5  # rows on the screen


def queue(
    run: Annotated[
        str,
        typer.Argument(
            help="The folder of a saved posterior or a stream; before the first fit, the name of "
            "a backbone, such as minilm.",
            show_default=False,
        ),
    ],
    data: options.Data,
    config: options.Config = None,
    n: Annotated[int, typer.Option("--n", help="How many texts.", min=1)] = 20,
    by: Annotated[
        Literal["information", "typical", "random"] | None,
        typer.Option(
            help="information: the texts whose labels, together, say most about the labels of all "
            "texts. typical: texts that are like many others. random: texts at random.",
            show_default="information; typical before the first fit",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The .csv or .jsonl file to write.")] = Path(
        "queue.csv"
    ),
    text_column: options.TextColumn = None,
    encoding: options.Encoding = None,
    seed: Annotated[int, typer.Option(help="The same seed chooses the same texts.")] = 0,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: options.OverwriteFile = False,
) -> None:
    """Choose the texts to label next, the most useful first, with a reason for each.

    The file has the columns of the data, an empty one for the label, and the reason. Fill in the
    labels, and give the file to bhpeft update. Texts that have been learnt are left out, and copies
    come once.

    Examples:
        bhpeft queue runs/reviews unlabelled.csv --n 20 --out queue.csv
        bhpeft queue minilm unlabelled.csv --n 50 --out first.csv
    """
    import pandas as pd

    from ..data import Columns
    from ..data.table import need, write
    from ..data.table import table as read
    from ..decisions.queue import first_to_label
    from ..model.backbone import load_backbone
    from ..model.tasks import categories
    from . import saved, tables

    saved.check_file(out, ".csv", ".jsonl", data=data, overwrite=overwrite)
    if not Path(run).is_dir() or Path(run, "config.json").exists():  # it names a backbone
        if backbone is not None:
            raise ConfigError(f"--backbone: {run!r} is one already; expected no other")
        try:
            transformer, tokenizer = load_backbone(run, device)
        except BHPEFTError as error:
            raise ConfigError(
                f"run: {run!r} is neither the folder of a posterior nor a backbone: {error}"
            ) from error
        model = categories(transformer, 2, kinds=(), tokenizer=tokenizer)
        columns = Columns() if text_column is None else Columns(text=text_column)
        label = columns.label
        rows = need(read(data, columns.inputs("class"), encoding), columns.text)
        chosen = first_to_label(model, rows, n, by=by or "typical", columns=columns, seed=seed)
        following = command("fit", out, "--backbone", run, "--out", "RUN")
    else:
        posterior = saved.reading(saved.open_run(Path(run), backbone, device), text_column)
        rows = tables.rows_for(posterior, data, encoding)
        chosen = posterior.queue(rows, n, by=by or "information", seed=seed)
        label = posterior.columns.target(posterior.model.likelihood.kind)
        following = command("update", run, out, "--out", "RUN")
    if text_column is not None:
        following += f" --text-column {shlex.quote(text_column)}"
    why = "reason"
    while why in (*rows, label):  # no column of the data is replaced
        why = f"queue_{why}"
    asked = rows.iloc[chosen.rows.tolist()]
    reasons = pd.Series(chosen.reasons, asked.index, dtype=object)
    write(out, asked.assign(**{label: None, why: reasons}))
    say(
        f"{len(chosen)} of {len(rows)} texts, by {chosen.by}; left out: {chosen.learnt} learnt, "
        f"{chosen.copies} copies; written to {out}"
    )
    say(f"next: fill in its column {label!r}, then: {following}")
    lines = [
        [number, reason, " ".join(text.split())]
        for (number, reason), text in zip(reasons.items(), chosen.texts, strict=True)
    ]
    table("To label first", [rows.attrs["unit"], "reason", "text"], lines[:_SHOWN])


def review(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    out: Annotated[Path, typer.Option(help="The .db file for the labels.")] = Path("labels.db"),
    new_round: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the round that is learnt in the page.", show_default="RUN-reviewed"
        ),
    ] = None,
    people: Annotated[int, typer.Option(help="How many people label each text.", min=1)] = 1,
    port: Annotated[
        int, typer.Option(help="The port on 127.0.0.1.", min=0, max=65535, show_default="any")
    ] = 0,
    encoding: options.Encoding = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
) -> None:
    """Label the texts that need a person, in a page on this machine.

    The most useful texts come first. One key labels a text, saves the label and shows the next
    text. To go on later, run the same command again. The file is an SQLite database with the
    texts, the labels, who gave them and their notes. Give it to bhpeft update; or press Learn in
    the page, which learns the labels in the background and orders the texts anew.

    The address that is printed holds a secret; anybody who has it, on this machine, can label.

    Examples:
        bhpeft review runs/reviews new.csv --out labels.db
        bhpeft review runs/reviews new.csv --out labels.db --people 2 --port 8765
    """
    from ..base.checks import optional_library
    from ..base.files import alone
    from ..data.table import table as read
    from ..review import Learning, Pool, Session, Where, application
    from . import saved

    uvicorn = optional_library("uvicorn", "serve")
    saved.check_file(out, ".db", ".sqlite", data=data)
    new_round = new_round or _beside(run)
    saved.check_out(new_round, overwrite=True)
    folder = saved.folder_of(run)
    rows = read(data, encoding=encoding)
    where = Where(folder, new_round, rows, out, backbone=backbone, device=device)
    learnt = 0
    if newer := where.newer():
        learnt = newer.examples
        say(f"going on with the round in {where.out}, which has learnt {learnt} labels")
    busy = (
        f"--out: another page labels into {out}; expected another file, or the address of that "
        "page, which serves several people"
    )
    with socket.socket() as listening, ExitStack() as until_the_end:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"--port: {port} cannot be used: {error.strerror}") from error
        until_the_end.enter_context(alone(out.with_suffix(".page"), busy))
        pool = Pool.of(saved.open_run(where.out if newer else run, backbone, device), rows)
        session = Session(pool, out, people)
        app = application(session, Learning(where, session.take, learnt), title=run.resolve().name)
        listening.listen()  # who opens the address at once waits
        host = f"http://127.0.0.1:{listening.getsockname()[1]}/{app.state.token}/"
        say(
            f"{len(session.pool.order)} of {len(session.pool.items)} texts to label; labels go to "
            f"{out}, which holds {session.labels} so far"
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        # Also before it runs, and when it repeats the signal after its end.
        signal.signal(signal.SIGINT, server.handle_exit)
        say(f"open {host}by/{_user()}/ to label, or {host} for another person; Ctrl-C ends")
        server.run(sockets=[listening])
    following = f" in {out}; next: {command('update', run, out, '--out', 'RUN')}"
    say(f"{session.labels} labels" + following * bool(session.labels))


def _beside(run: Path) -> Path:
    from .saved import ROUNDS

    run = run.resolve()  # "." and ".." have no name
    while ROUNDS in (run.name, run.parent.name):  # beside the stream, which has rounds of its own
        run = run.parent
    return run.with_name(f"{run.name}-reviewed")


def _user() -> str:
    """The name of who runs this, for an address."""
    try:
        return "".join(letter for letter in getpass.getuser() if letter.isalnum()) or "me"
    except (OSError, KeyError):  # a container without users
        return "me"
