"""The program: its commands, its exit codes, and one line for an error.

Exit codes: 0 fine, 2 bad input, 1 anything else, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import datasets
import typer
from transformers import logging
from typer.core import TyperGroup

from ..errors import BHPEFTError, FitError
from . import compare, evaluate, fit, history, predict, report, stream, update
from .screen import say, spoken_warnings

__all__ = ["app", "main", "quieten", "spoken_errors"]


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
for module in (fit, compare, predict, evaluate, update, stream, history, report):
    name = module.__name__.rpartition(".")[2]
    command = getattr(module, name)
    # Paragraphs without their line breaks, which the help would keep.
    paragraphs = [" ".join(part.split()) for part in command.__doc__.split("\n\n")]
    examples = ("Examples:", *module.EXAMPLES)
    app.command(name, help="\n\n".join(paragraphs), epilog="\n\n".join(examples))(command)


def quieten() -> None:
    """No bars and messages of the libraries' own."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main() -> None:
    """Run the program."""
    quieten()
    app(prog_name="bhpeft")
