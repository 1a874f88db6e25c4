"""Arguments and options that several commands share.

A YAML file in place of options: `--config fit.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from ..errors import ConfigError
from ..options import FitOptions

__all__ = [
    "Again",
    "Backbone",
    "Components",
    "Config",
    "Data",
    "Device",
    "DrawSeed",
    "Grow",
    "Json",
    "Keep",
    "Out",
    "Overwrite",
    "Run",
    "Samples",
    "Validation",
    "declaring",
    "fitting",
    "fraction",
    "given",
    "read_config",
]


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's entries the defaults of a command, under the names its options have.

    What stands on the command line comes first. Values are read as they would be there.

    Raises:
        ConfigError: the file cannot be read, or has an entry that is no option.
    """
    if path is None:
        return None
    names: dict[str, str] = {}
    for parameter in context.command.params:
        assert parameter.name is not None
        if parameter.name != "config":
            names[max(parameter.opts, key=len).lstrip("-").replace("_", "-")] = parameter.name
    defaults = {}
    for key, value in _read(path).items():
        name = str(key).replace("_", "-")
        if name not in names:
            raise ConfigError(
                f"--config: {path} has {key!r}, which {context.info_name!r} does not know; "
                f"known: {', '.join(names)}"
            )
        if isinstance(value, (dict, list)):
            raise ConfigError(
                f"--config: {path}: {key!r} is a {type(value).__name__}; expected one value"
            )
        if value is not None:
            defaults[names[name]] = str(value)
    context.default_map = defaults
    return path


def _read(path: Path) -> dict[object, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} has no `option: value` lines")
    return content


Command = Callable[..., None]


def given(context: typer.Context) -> dict[str, Any]:
    """The `FitOptions` that were given to a command."""
    known = {field.name for field in fields(FitOptions)}
    return {k: v for k, v in context.params.items() if k in known and v is not None}


def fraction(text: str, option: str) -> float:
    """A share written as `10%` or `0.1`.

    >>> fraction("2.5%", "--flag")
    0.025
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"{option}: {text!r} is no share; expected 0.1 or 10%, say")
    return value


Data = Annotated[
    str,
    typer.Argument(
        help="A .csv, .json or .jsonl file, or a data set on the hub, as in ag_news:test.",
        show_default=False,
    ),
]
Run = Annotated[
    Path, typer.Argument(help="The folder of a saved posterior, or a stream.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="The folder to save the posterior in.", show_default=False)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the posterior that is in --out.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="A YAML file with these options; options on the command line win.",
        callback=read_config,
        is_eager=True,
        show_default=False,
    ),
]
Keep = Annotated[
    float,
    typer.Option(
        help="Share of the old evidence to keep; below 1 the past is partly forgotten.",
        min=0,
        max=1,
    ),
]
Grow = Annotated[
    bool, typer.Option("--grow", help="Give labels that are new an output of their own.")
]
Again = Annotated[
    bool, typer.Option("--again", help="Learn data that an earlier round has learnt.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout in place of tables.")]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="Where the backbone is now, if it has moved; checked by its fingerprint.",
        show_default="the one it was fitted on",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where to run; auto takes a GPU if there is one."),
]
Samples = Annotated[
    int | None,
    typer.Option(
        help="Draws of a prediction; 0 is one pass at the posterior mean.",
        min=0,
        show_default="1000 of the outputs under laplace, else 32 of the weights",
    ),
]
Components = Annotated[
    int | None,
    typer.Option(
        help="Independent fits from starts of their own, which predict together as a mixture.",
        min=1,
        show_default="5 of laplace, else 1",
    ),
]
DrawSeed = Annotated[int, typer.Option("--seed", help="The same seed gives the same draws.")]
Validation = Annotated[
    str,
    typer.Option(
        help="Rows held out to see how good the posterior is: a share of the data (10%), "
        "a file, or 0 for none.",
        metavar="SHARE|FILE",
    ),
]


def _fitting(name: str, help: str, *flags: str) -> Any:
    """One of `FitOptions`; None leaves it at the default, or at the last round's value."""
    default = getattr(FitOptions(), name)
    shown = "" if default is None or isinstance(default, bool) else f" ({default:g})"
    return typer.Option(*flags, help=help + shown, rich_help_panel="How to fit", show_default=False)


_FITTING = {
    "epochs": Annotated[int | None, _fitting("epochs", "Passes over the data")],
    "max_steps": Annotated[
        int | None, _fitting("max_steps", "Optimiser steps, in place of epochs")
    ],
    "batch_size": Annotated[int | None, _fitting("batch_size", "Examples a pass")],
    "particles": Annotated[
        int | None, _fitting("particles", "Weight draws that share out a batch")
    ],
    "lr": Annotated[
        float | None, _fitting("lr", "Learning rate of Adam, for what has no step size of its own")
    ],
    "joint_lr": Annotated[
        float | None, _fitting("joint_lr", "Step size of joint guides' means, in prior sds")
    ],
    "natural_lr": Annotated[
        float | None, _fitting("natural_lr", "Step size of the means and sds of normal guides")
    ],
    "temperature": Annotated[
        float | None,
        _fitting(
            "temperature",
            "Weight of the KL: 1 is the posterior, 0 none; under laplace and delta how strongly "
            "the prior pulls at the point",
        ),
    ],
    "tau": Annotated[
        float | None,
        _fitting("tau", "Prior precision in the width under laplace (by the held-out rows)"),
    ],
    "patience": Annotated[
        int | None, _fitting("patience", "Stop after so many epochs without a better held-out NLL")
    ],
    "bf16": Annotated[bool | None, _fitting("bf16", "Autocast to bfloat16", "--bf16/--no-bf16")],
    "seed": Annotated[
        int | None, _fitting("seed", "Of draws, the data's order and the choice of held-out rows")
    ],
}


def fitting(*without: str) -> Callable[[Command], Command]:
    """Give a command the options of a fit, which it reads from its context by `given`.

    Args:
        without: options that it is not to have.
    """
    kinds = {name: kind for name, kind in _FITTING.items() if name not in without}
    return declaring({name: (kind, None) for name, kind in kinds.items()}, lambda values: {})


def declaring(
    added: Mapping[str, tuple[Any, Any]],
    gather: Callable[[dict[str, Any]], dict[str, Any]],
    place: str | None = None,
) -> Callable[[Command], Command]:
    """Give a command options that are declared elsewhere.

    Args:
        added: their annotations and defaults by name.
        gather: from their values to the arguments that the command takes in their stead.
        place: an argument of the command where they are to be; by default the end.
    """
    more = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in added}
            command(**arguments, **gather(values))

        own = signature(command, eval_str=True)
        parameters = [*own.parameters.values()]
        at = len(parameters) if place is None else [*own.parameters].index(place)
        parameters[at : at + (place is not None)] = more
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate
