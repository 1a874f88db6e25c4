"""The program: its commands, its exit codes, and errors in one line.

Exit codes: 0 success, 2 bad input, 1 any other failure, 130 interrupted.

`--help`, `--version` and errors in options need neither PyTorch nor Transformers, which take
seconds to import. So a command's module imports them in the command itself, when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import BHPEFTError, BusyError, FitError, is_out_of_memory
from .answer_commands import predict, promise
from .label_commands import queue, review
from .learn_commands import distill, fit, update
from .options import flat
from .round_commands import history, stream
from .score_commands import compare, evaluate, report
from .screen import interactive, say, spoken_warnings
from .serve_command import serve


@contextmanager
def spoken_errors() -> Iterator[None]:
    """Print deliberate errors in one line, without a traceback."""

    def fail(error: Exception, code: int) -> NoReturn:
        say(f"error: {error}")
        raise typer.Exit(code) from error

    try:
        with spoken_warnings():
            yield
    except BrokenPipeError:  # under `| head`: Typer then ends the program without a message
        raise
    except (FitError, BusyError, OSError) as error:  # the input may be fine
        fail(error, 1)
    except BHPEFTError as error:
        fail(error, 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first, *_ = str(error).splitlines() or [""]
        fail(MemoryError(f"not enough memory. {first}"), 1)


class Commands(TyperGroup):
    """Commands whose errors are printed in one line."""

    def invoke(self, ctx: Any) -> Any:
        with spoken_errors():
            return super().invoke(ctx)


def quietly(command: Callable[..., None]) -> Callable[..., None]:
    """The command without messages of other libraries."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        if interactive():
            say("starting")  # the imports take seconds
        import datasets
        from huggingface_hub.utils import enable_progress_bars
        from transformers import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        if interactive():
            enable_progress_bars()  # of downloads
        command(**arguments)

    return run


app = typer.Typer(
    name="bhpeft",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Bayesian parameter-efficient fine-tuning: fit a posterior over small weights on a frozen "
    "transformer, predict with uncertainty, and update it with new data.",
    epilog="bhpeft COMMAND --help shows the options, and examples.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bhpeft {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


COMMANDS = (
    *(fit, compare, predict, evaluate, distill, promise, queue),
    *(review, update, stream, history, report, serve),
)
for command in COMMANDS:
    text, _, examples = (command.__doc__ or "").partition("Examples:")
    # Typer would keep the line breaks within a paragraph.
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    lines = ["Examples:", *(line.strip() for line in examples.strip().splitlines())]
    app.command(command.__name__, help="\n\n".join(paragraphs), epilog="\n\n".join(lines))(
        quietly(flat(command))
    )
