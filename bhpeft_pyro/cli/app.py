"""The program: its commands, its exit codes, and one line for an error.

Exit codes: 0 fine, 2 bad input, 1 anything else, 130 interrupted.

`--help`, `--version` and an error in an option need neither PyTorch nor Transformers, which take
seconds to import: so a command imports what it needs when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import BHPEFTError, FitError
from . import compare, evaluate, fit, history, predict, report, stream, update
from .screen import say, spoken_warnings

__all__ = ["app", "main", "quietly", "spoken_errors"]


@contextmanager
def spoken_errors() -> Iterator[None]:
    """Errors made on purpose are one line, without a traceback."""
    try:
        with spoken_warnings():
            yield
    except FitError as error:  # the data may be fine
        _fail(error, 1)
    except BHPEFTError as error:
        _fail(error, 2)
    except OSError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        say("interrupted; what was saved before is as it was")
        raise


class Commands(TyperGroup):
    """A program whose errors are spoken."""

    def invoke(self, ctx: Any) -> Any:
        with spoken_errors():
            return super().invoke(ctx)


def _fail(error: Exception, code: int) -> NoReturn:
    say(f"error: {error}")
    raise typer.Exit(code) from error


def quietly(command: Callable[..., None]) -> Callable[..., None]:
    """The command without bars and messages of the libraries' own."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        import datasets
        from transformers import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        command(**arguments)

    return run


app = typer.Typer(
    name="bhpeft",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Bayesian hybrid fine-tuning: small random weights on a frozen transformer, "
    "with predictions that say how sure they are.",
    epilog="bhpeft COMMAND --help has the options, and examples.",
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


for module in (fit, compare, predict, evaluate, update, stream, history, report):
    name = module.__name__.rpartition(".")[2]
    command = getattr(module, name)
    # Paragraphs without their line breaks, which the help would keep.
    paragraphs = [" ".join(part.split()) for part in command.__doc__.split("\n\n")]
    examples = ("Examples:", *module.EXAMPLES)
    help_ = "\n\n".join(paragraphs)
    app.command(name, help=help_, epilog="\n\n".join(examples))(quietly(command))


def main() -> None:
    """Run the program."""
    app(prog_name="bhpeft")
