"""What is to be fitted, as commands that begin from a table have it: task, PEFT weights, guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from ..errors import ConfigError
from ..guides import GUIDES, PRESETS
from ..peft import Kind, presets
from .task import TaskName

__all__ = [
    "Guide",
    "LabelColumn",
    "MaxLength",
    "NewBackbone",
    "NoiseByText",
    "PairColumn",
    "Preset",
    "Task",
    "TextColumn",
    "Unlabelled",
    "check_guide",
    "kinds",
]

_GUIDES = (*GUIDES, *PRESETS)

NewBackbone = Annotated[
    str,
    typer.Option(help="The frozen transformer: a name on the hub, a folder, or minilm (PyPI)."),
]
Task = Annotated[
    TaskName | None,
    typer.Option(help="What is to be predicted.", show_default="from columns and labels"),
]
TextColumn = Annotated[str | None, typer.Option(help="The column to read.", show_default="text")]
PairColumn = Annotated[
    str | None, typer.Option(help="A second text, read after the first.", show_default="none")
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="The column to predict.", show_default="label, rating, stars or score"),
]
Preset = Annotated[
    str, typer.Option(help=f"The random PEFT weights: {', '.join(presets.__all__)}.")
]
Guide = Annotated[str, typer.Option(help=f"The family of the posterior: {', '.join(_GUIDES)}.")]
NoiseByText = Annotated[
    bool, typer.Option("--noise-by-text", help="Ratings: a noise scale for each text.")
]
MaxLength = Annotated[
    int | None, typer.Option(help="Cut longer texts.", show_default="the tokenizer's limit")
]
Unlabelled = Annotated[
    str | None,
    typer.Option(
        help="More texts, without labels, that set the coordinates where labelled ones are few.",
        metavar="FILE",
        show_default="none",
    ),
]


def kinds(preset: str) -> Sequence[Kind]:
    """The PEFT kinds of a preset, by its name."""
    if preset not in presets.__all__:
        raise ConfigError(f"--preset: unknown {preset!r}; known: {', '.join(presets.__all__)}")
    found: Sequence[Kind] = getattr(presets, preset)()
    return found


def check_guide(guide: str) -> None:
    """Refuse an unknown guide before any work is done."""
    if guide not in _GUIDES:
        raise ConfigError(f"--guide: unknown guide {guide!r}; known: {', '.join(_GUIDES)}")
