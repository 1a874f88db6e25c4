"""`bhpeft review`: a page on this machine, where people label the texts that need a person."""

from __future__ import annotations

import getpass
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import options
from .screen import command, say


def review(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    out: Annotated[Path, typer.Option(help="The .csv file for the labels.")] = Path("labels.csv"),
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
    backbone: options.Backbone = None,
    device: options.Device = "auto",
) -> None:
    """Label the texts that need a person, in a page on this machine.

    The most useful texts come first. One key labels a text, saves the label and shows the next
    text. To go on later, run the same command again. The file has the columns of the data, the
    label, who gave it and their notes. Give it to bhpeft update; or press Learn in the page, which
    learns the labels in the background and orders the texts anew.

    The address that is printed holds a secret; anybody who has it, on this machine, can label.

    Examples:
        bhpeft review runs/reviews new.csv --out labels.csv
        bhpeft review runs/reviews new.csv --out labels.csv --people 2 --port 8765
    """
    from ..base.checks import optional_library
    from ..review import Journal, Learning, Pool, Session, Where, application
    from ..review.page import WHY
    from .saved import check_file, check_out, folder_of, open_run

    uvicorn = optional_library("uvicorn", WHY)
    check_file(out, ".csv", data=data)
    new_round = new_round or _beside(run)
    check_out(new_round, overwrite=True)
    journal = Journal(out.with_suffix(".journal.jsonl"))
    if out.exists() and not journal.path.exists():
        raise ConfigError(
            f"--out: {out} exists, without the journal {journal.path.name} beside it; expected "
            "another file"
        )
    where = Where(folder_of(run), new_round, data, out, backbone=backbone, device=device)
    learnt = 0
    if newer := where.newer():
        learnt = newer.examples
        say(f"going on with the round in {where.out}, which has learnt {learnt} labels")
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"--port: {port} cannot be used: {error.strerror}") from error
        pool = Pool.of(open_run(where.out if newer else run, backbone, device), data)
        session = Session(pool, journal, out, people)
        app = application(session, Learning(where, session.take, learnt), title=run.resolve().name)
        listening.listen()  # who opens the address at once waits
        host = f"http://127.0.0.1:{listening.getsockname()[1]}/{app.state.token}/"
        say(
            f"{len(session.pool.order)} of {len(session.pool.items)} texts to label; labels go to "
            f"{out}, which holds {session.labels} so far"
        )
        say(f"open {host}by/{_user()}/ to label, or {host} for another person; Ctrl-C ends")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        # The server has a handler of its own, and repeats the signal when it has ended.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
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
