"""What is to be fitted, as commands that begin from a table have it: task, PEFT weights, guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Literal, get_type_hints

import typer

from ..errors import ConfigError
from . import options

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import Columns
    from ..model.model import Model
    from .task import Task

__all__ = [
    "FAMILIES",
    "POINTS",
    "PRESETS",
    "Recipe",
    "TaskName",
    "check_guide",
    "options_of_recipe",
]

TaskName = Literal["classes", "ratings", "choices"]
# The names alone: what they stand for is slow to import, and `--help` need not wait for it.
PRESETS = ("adapter", "bh_peft", "head_only", "lora", "mam", "prefix", "unipelt")
FAMILIES = ("laplace", "normal", "lowrank", "full", "delta", "down only", "A only")
POINTS = ("laplace", "delta")
"""Families that choose by held-out rows."""


@dataclass(frozen=True)
class Recipe:
    """The options, by their names, and what they come to."""

    backbone: Annotated[
        str,
        typer.Option(
            help="The frozen transformer: a name on the hub, a folder, minilm or smollm2."
        ),
    ] = "roberta-base"
    task: Annotated[
        TaskName | None,
        typer.Option(help="What is to be predicted.", show_default="from columns and labels"),
    ] = None
    text_column: Annotated[
        str | None, typer.Option(help="The column to read.", show_default="text")
    ] = None
    pair_column: Annotated[
        str | None, typer.Option(help="A second text, read after the first.", show_default="none")
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option(help="The column to predict.", show_default="label, rating, stars or score"),
    ] = None
    preset: Annotated[str, typer.Option(help=f"The random PEFT weights: {', '.join(PRESETS)}.")] = (
        "bh_peft"
    )
    guide: Annotated[
        str, typer.Option(help=f"The family of the posterior: {', '.join(FAMILIES)}.")
    ] = "laplace"
    noise_by_text: Annotated[
        bool, typer.Option("--noise-by-text", help="Ratings: a noise scale for each text.")
    ] = False
    max_length: Annotated[
        int | None, typer.Option(help="Cut longer texts.", show_default="the tokenizer's limit")
    ] = None
    unlabelled: Annotated[
        str | None,
        typer.Option(
            help="More texts, without labels, that set the coordinates where labelled ones are "
            "few.",
            metavar="FILE",
            show_default="none",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            known = ", ".join(PRESETS)
            raise ConfigError(f"--preset: unknown {self.preset!r}; known: {known}")
        check_guide(self.guide)

    def task_of(self, table: Dataset) -> Task:
        """What the table is to be used for."""
        from .task import infer

        return infer(table, self.task, self.text_column, self.label_column, self.pair_column)

    def model(self, found: Task, device: str) -> Model:
        """The model for a task."""
        from ..model.backbone import load_backbone
        from ..peft import presets

        kinds = getattr(presets, self.preset)()
        return found.model(*load_backbone(self.backbone, device), kinds, self.noise_by_text)

    def columns(self, found: Task) -> Columns:
        """How the table is read."""
        return replace(found.columns, max_length=self.max_length, label_names=found.names)

    def unlabelled_rows(self) -> Dataset | None:
        """The rows of `unlabelled`, if there are any."""
        from .runs import read_table

        return None if self.unlabelled is None else read_table(self.unlabelled)


def options_of_recipe(*without: str) -> Callable[[options.Command], options.Command]:
    """Give a command with an argument `recipe` the options of one in its place.

    Args:
        without: options that it is not to have.
    """
    kinds = get_type_hints(Recipe, include_extras=True)
    there = [field for field in fields(Recipe) if field.name not in without]
    assert not any(field.default is MISSING for field in there)
    added = {field.name: (kinds[field.name], field.default) for field in there}
    return options.declaring(added, lambda values: {"recipe": Recipe(**values)}, "recipe")


def check_guide(guide: str) -> None:
    """Refuse an unknown guide before any work is done."""
    if guide not in FAMILIES:
        raise ConfigError(f"--guide: unknown guide {guide!r}; known: {', '.join(FAMILIES)}")
