"""Arguments and options that several commands share. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
import yaml

from ..base import names
from ..base.checks import data_file
from ..base.fit_options import FitOptions
from ..errors import ConfigError

POINTS = ("laplace", "delta")
"""Guides that train points, and choose by held-out rows which step of the training to keep."""


def share(text: str) -> float:
    """A share written as `10%` or `0.1`.

    >>> share("2.5%")
    0.025
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is not a share; expected 10% or 0.1, for example")
    return value


def share_or_file(text: str) -> float | str:
    """A share if the text is a number, else the text."""
    try:
        float(text.removesuffix("%"))
    except ValueError:
        return text
    return share(text)


def check_data(given: Any) -> Any:
    """Refuse a file that is not there before anything slow is imported."""
    if isinstance(given, str):
        data_file(given)
    return given


def _check_run(run: Path) -> Path:
    if not run.is_dir():
        raise ConfigError(f"run: there is no folder {run}")
    return run


def share_option(help: str, show_default: str | bool = True) -> Any:
    """An option for a share."""
    return typer.Option(help=help, metavar="SHARE", parser=share, show_default=show_default)


def held_out(help: str, **how: Any) -> Any:
    """An option for rows that are held out: a share of the data, or a file."""
    return typer.Option(
        help=help, metavar="SHARE|FILE", parser=share_or_file, callback=check_data, **how
    )


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's entries the defaults of a command, parsed as on the command line."""
    if path is None:
        return None
    try:
        # Nodes, whose values are text: `load` would take the last of two without a word.
        content = yaml.compose(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config: {path} cannot be read as YAML: {reason}") from error
    pairs = content.value if isinstance(content, yaml.MappingNode) else []
    named = all(isinstance(key, yaml.ScalarNode) for key, _ in pairs)
    if content is not None and not (pairs and named):
        raise ConfigError(f"--config: {path} has no `option: value` lines")
    entries = [(key.value.replace("_", "-"), value.value) for key, value in pairs]
    options = [option for option in context.command.params if option.name != "config"]
    names = {max(option.opts, key=len).lstrip("-"): option.name for option in options}
    defaults = {}
    for key, value in entries:
        name = names.pop(key, None)
        if name is None or not isinstance(value, str):
            raise ConfigError(
                f"--config: {path}: {key!r}: expected an option of {context.info_name!r}, once and "
                f"with a single value; there are also {', '.join(names)}"
            )
        if value.lower() not in ("", "~", "null"):
            defaults[name] = value
    context.default_map = defaults
    return path


def listed(names: Any) -> str:
    """The values of a Literal, as a shell takes them."""
    return ", ".join(f'"{name}"' if " " in name else name for name in get_args(names))


_DATA = (
    "A .csv, .tsv, .json, .jsonl, .parquet, .xlsx or .ods file, or a data set on the hub "
    "(fancyzhx/ag_news:test)."
)
_RUN = "The folder of a saved posterior or a stream."
_OUT = "The folder to save the posterior in."
_CONFIG = "A YAML file with these options; the command line takes precedence."
_VALIDATION = (
    "Rows to test on, which are not learnt: a share of the data, or a file. They also decide how "
    "certain to be and, if a first fit has 50 of them or more, which step to keep. 0 shows no "
    "metrics: then `update` learns all rows, but `fit` holds some out for these decisions, unless "
    "--temperature 1 --tau 1 are added."
)
_ALL_DRAWS = "1000 of the outputs under laplace, else 32 of the weights"
_FIT = "How to fit"

Data = Annotated[str, typer.Argument(help=_DATA, show_default=False, callback=check_data)]
Encoding = Annotated[
    str | None,
    typer.Option(
        help="The encoding of text files, such as latin-1.", show_default="UTF-8, or a guess"
    ),
]
Run = Annotated[Path, typer.Argument(help=_RUN, show_default=False, callback=_check_run)]
Out = Annotated[Path, typer.Option(help=_OUT, show_default=False)]
OtherOut = Annotated[
    Path | None, typer.Option(help="Another folder to save in.", show_default="RUN itself")
]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
Config = Annotated[
    Path | None, typer.Option(help=_CONFIG, callback=read_config, is_eager=True, show_default=False)
]
Preset = Annotated[
    names.Preset, typer.Option(help=f"The random weights: {listed(names.Preset)}.", metavar="NAME")
]
Guide = Annotated[
    names.GuideName,
    typer.Option(
        help=f"The family of the posterior: {listed(names.GuideName)}. delta is a point estimate, "
        "which `update` refuses.",
        metavar="NAME",
    ),
]
Components = Annotated[
    int | None,
    typer.Option(
        help="Independent fits from different initial values, which predict as a mixture.",
        min=1,
        show_default="5 of laplace, else 1",
    ),
]
Validation = Annotated[
    Any, held_out(_VALIDATION, show_default="a fifth, 500 rows at most, and none of fewer than 50")
]
Keep = Annotated[
    float,
    typer.Option(help="How much of the old evidence to keep; less than 1 forgets.", min=0, max=1),
]
Grow = Annotated[bool, typer.Option("--grow", help="Add outputs for labels that are new.")]
Again = Annotated[bool, typer.Option("--again", help="Learn data that were learnt already.")]
Samples = Annotated[
    int | None,
    typer.Option(
        help="Draws for each prediction; 0 predicts once, at the mean of each component.",
        min=0,
        show_default=_ALL_DRAWS,
    ),
]
Method = Annotated[
    names.Method | None,
    typer.Option(
        help="student: one pass of the network that `distill` has trained. exact: forward and "
        "backward passes of each component.",
        show_default="the first of these that RUN has; with --samples no student",
    ),
]
DrawSeed = Annotated[int, typer.Option("--seed", help="The same seed gives the same draws.")]
Backbone = Annotated[
    str | None,
    typer.Option(help="Where the backbone is, if it has moved.", show_default="where it was"),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="auto uses a GPU if there is one.")
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        help="The column to read, if it has another name here.",
        show_default="that of the training data",
    ),
]
Distill = Annotated[
    str | None,
    typer.Option(
        help="Texts to train a student on after each round, as `distill` does.",
        metavar="DATA",
        show_default="no student",
        callback=check_data,
    ),
]
Error = Annotated[Any, share_option("The largest share of wrong answers to promise.", "5%")]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="For ratings: the distance up to which an answer is right.", show_default="none"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True)
class Reading:
    """The backbone, and what the columns of a table are for."""

    backbone: Annotated[
        str, typer.Option(help="A hub name, a folder, a GGUF file, minilm, mpnet or smollm2.")
    ] = "FacebookAI/roberta-base"
    task: Annotated[
        names.Task | None,
        typer.Option(help="What to predict.", show_default="from columns and labels"),
    ] = None
    text_column: Annotated[
        str | None, typer.Option(help="The column to read.", show_default="text")
    ] = None
    pair_column: Annotated[
        str | None, typer.Option(help="A second text, read after the first.", show_default="none")
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option(
            help="The column to predict.", show_default="label, labels, rating, stars or score"
        ),
    ] = None
    max_length: Annotated[
        int | None,
        typer.Option(help="Cut longer texts.", show_default="what the backbone can read"),
    ] = None

    encoding: Encoding = None

    @property
    def texts(self) -> list[str]:
        """Columns in which a comma is no decimal point."""
        inputs = [self.text_column or "text", self.pair_column, "question", "choices"]
        return [column for column in inputs if column and column != self.label_column]


@dataclass(frozen=True)
class Saving:
    """Where a posterior goes that a command has fitted, and what is shown and made of it."""

    out: Out
    validation: Validation = None
    samples: Samples = None
    distill: Distill = None
    overwrite: Overwrite = False
    as_json: Json = False


def _fitting(name: str, help: str, *flags: str) -> Any:
    default = getattr(FitOptions(), name)
    shown = "" if default is None or isinstance(default, bool) else f" ({default:g})"
    return typer.Option(*flags, help=help + shown, rich_help_panel=_FIT, show_default=False)


_TEMPERATURE = (
    "Weight of the KL: 1 gives the posterior, 0 ignores the prior. For laplace and delta, the "
    "weight of the prior when the point estimate is trained (in later rounds of laplace, of the "
    "first prior: what earlier data taught always counts in full)"
)
_TAU = "Weight of the prior in the covariance of laplace (by default, held-out rows choose it)"
_PASSES = (
    "Passes over the data (15; for laplace and delta 5 if rows are held out, but 15 with 50 "
    "ratings or more; and 5 in later rounds)"
)
_KEEP_TEXTS = (
    "Save up to 2,000 of the learnt texts: predictions show the nearest one, and rounds with new "
    "labels need no earlier rows"
)
_SEED = "Seed of the draws, the order of the data and the choice of held-out rows"


@dataclass(frozen=True)
class Fitting:
    """Some of `FitOptions`; None leaves one at its default, or as it was in the last round."""

    epochs: Annotated[int | None, _fitting("epochs", _PASSES)] = None
    max_steps: Annotated[int | None, _fitting("max_steps", "Steps, instead of epochs")] = None
    batch_size: Annotated[int | None, _fitting("batch_size", "Examples in a batch")] = None
    lr: Annotated[float | None, _fitting("lr", "Learning rate (by default the guide's own)")] = None
    temperature: Annotated[float | None, _fitting("temperature", _TEMPERATURE)] = None
    tau: Annotated[float | None, _fitting("tau", _TAU)] = None
    bf16: Annotated[bool | None, _fitting("bf16", "Use bfloat16", "--bf16/--no-bf16")] = None
    keep_texts: Annotated[
        bool | None, _fitting("keep_texts", _KEEP_TEXTS, "--keep-texts/--no-keep-texts")
    ] = None
    seed: Annotated[int | None, _fitting("seed", _SEED)] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Stopping(Fitting):
    """The same with early stopping, which needs held-out rows."""

    patience: Annotated[
        int | None,
        _fitting(
            "patience",
            "Stop when the held-out NLL has not improved for this many epochs. A first fit of "
            "laplace or delta without --temperature has a rule of its own",
        ),
    ] = None


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameters that are dataclasses."""
    grouped = signature(command, eval_str=True)
    groups: dict[str, Any] = {}
    parameters = []
    for name, parameter in grouped.parameters.items():
        options = [parameter]
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            options = [*signature(groups[name], eval_str=True).parameters.values()]
        parameters += [option.replace(kind=Parameter.KEYWORD_ONLY) for option in options]

    @wraps(command)
    def run(**arguments: Any) -> None:
        for name, kind in groups.items():
            values = {field: arguments.pop(field) for field in kind.__dataclass_fields__}
            arguments[name] = kind(**values)
        command(**arguments)

    run.__signature__ = grouped.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
