"""Tables of numbers with their standard errors, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from scipy.stats import sem

__all__ = ["Cell", "Row", "Table"]


@dataclass(frozen=True)
class Cell:
    """A number, and its standard error where it is a mean over seeds. Counts are whole numbers.

    >>> str(Cell.of([0.5, 1.5, 2.5])), str(Cell(0.5)), str(Cell(5))
    ('1.500 ± 0.577', '0.500', '5')
    """

    value: float
    error: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """Mean and standard error of one or more values, one a seed."""
        return cls(mean(values), float(sem(values)) if len(values) > 1 else None)

    def __str__(self) -> str:
        if isinstance(self.value, int):
            return str(self.value)
        return f"{self.value:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        head: what it is about, a text for each of `Table.head`.
        cells: by column; some may be missing.
    """

    head: tuple[str, ...]
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: what it shows.
        head: names of the first columns, which are text.
        columns: names of the others, which are numbers.
        rows: its lines.
        note: where the numbers come from.
    """

    title: str
    head: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Sequence[Row]
    note: str = ""

    def markdown(self) -> str:
        """A heading, the table and its note.

        >>> print(Table("T", ("",), ("nll",), [Row(("a",), {"nll": Cell(0.5)})], "N.").markdown())
        ## T
        <BLANKLINE>
        |  | nll |
        |---|---|
        | a | 0.500 |
        <BLANKLINE>
        N.
        """
        lines = [(*self.head, *self.columns), *self._texts(str)]
        shown = ["| " + " | ".join(line) + " |" for line in lines]
        shown.insert(1, "|" + "---|" * len(lines[0]))
        return "\n".join([f"## {self.title}", "", *shown, "", self.note]).rstrip()

    def csv(self) -> str:
        """Numbers in full, standard errors in columns of their own."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        with_error = {
            c for row in self.rows for c, cell in row.cells.items() if cell.error is not None
        }
        names: list[str] = []
        for column in self.columns:
            names += [column, f"{column} se"] if column in with_error else [column]
        writer.writerow([*self.head, *names])
        for row in self.rows:
            numbers: dict[str, float | None] = {}
            for column, cell in row.cells.items():
                numbers |= {column: cell.value, f"{column} se": cell.error}
            writer.writerow([*row.head, *(numbers.get(name) for name in names)])
        return file.getvalue()

    def latex(self) -> str:
        """A `table` with booktabs' rules."""
        names = " & ".join(map(_escaped, (*self.head, *self.columns)))
        lines = [" & ".join(map(_escaped, line)) + r" \\" for line in self._texts(str)]
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_escaped(f'{self.title}. {self.note}')}}}",
                rf"\begin{{tabular}}{{{'l' * len(self.head)}{'r' * len(self.columns)}}}",
                r"\toprule",
                names + r" \\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )

    def _texts(self, shown: Callable[[Cell], str]) -> list[tuple[str, ...]]:
        return [
            (*row.head, *(shown(row.cells[c]) if c in row.cells else "" for c in self.columns))
            for row in self.rows
        ]


def _escaped(text: str) -> str:
    for character in "&%_#":
        text = text.replace(character, f"\\{character}")
    return text.replace("±", r"$\pm$")
