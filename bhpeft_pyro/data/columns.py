"""What kinds of data there are, and under which names a source keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..likelihoods import Kind

__all__ = ["DEFAULT_COLUMNS", "Columns", "Kind"]


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a data set.

    Attributes:
        text: the text (kinds "class" and "rating").
        pair: a second text that is read after the first one (premise and hypothesis, say).
        label: class or rating.
        question: the question (kind "choice").
        choices: 2 to 8 possible answers: a list of str, or `{"text": [...], "label": [...]}`.
        answer: the right choice: its index, its text, or its entry in `label`.

    Raises:
        ConfigError: two of one kind are the same.

    >>> Columns(text="review").text
    'review'
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"

    def __post_init__(self) -> None:
        for names in (
            (self.text, self.pair, self.label),
            (self.question, self.choices, self.answer),
        ):
            given = [name for name in names if name is not None]
            if len(set(given)) < len(given):
                raise ConfigError(
                    f"columns: {', '.join(map(repr, given))} must be different columns"
                )

    def inputs(self, kind: Kind) -> tuple[str, ...]:
        """The columns that hold text, in reading order."""
        if kind == "choice":
            return (self.question, self.choices)
        return (self.text,) if self.pair is None else (self.text, self.pair)

    def target(self, kind: Kind) -> str:
        """The column that holds what is to be predicted."""
        return self.answer if kind == "choice" else self.label


DEFAULT_COLUMNS = Columns()
