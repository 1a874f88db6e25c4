"""Tables of means over seeds with their standard errors, as Markdown and CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats
from torch import Tensor

from bhpeft_pyro.forecast.metrics import mean_and_error

__all__ = ["DIFFERENCES", "OVER_SEEDS", "Number", "Table", "difference", "distinct", "publish"]

OVER_SEEDS = "Mean ± standard error over seeds."
Number = tuple[float, float]
"""A mean and its standard error, which is nan where there is none."""


def distinct(facts: Iterable[Mapping[str, Any]], name: str) -> str:
    """The values of one fact, each once.

    >>> distinct([{"commit": "a"}, {"commit": "b"}, {"commit": "a"}], "commit")
    'a/b'
    """
    return "/".join(dict.fromkeys(str(fact[name]) for fact in facts))


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: what it shows.
        means: numbers; the index says what each row is about. NaN where there is none.
        errors: their standard errors over seeds, NaN where there is one seed only.
        note: where the numbers come from.
    """

    title: str
    means: pd.DataFrame
    errors: pd.DataFrame
    note: str = ""

    @classmethod
    def over_seeds(
        cls, title: str, head: Sequence[str], records: Sequence[Mapping[str, Any]], note: str = ""
    ) -> Table:
        """Mean and standard error of all records that agree in the columns `head`.

        >>> records = [{"method": "LoRA", "nll": value} for value in (0.5, 1.5, 2.5)]
        >>> print(Table.over_seeds("news", ["method"], records).markdown())
        ## news
        <BLANKLINE>
        | method | seeds | nll |
        |---|---|---|
        | LoRA | 3 | 1.500 ± 0.577 |
        """
        frame = pd.DataFrame(list(records))
        groups = frame.groupby(list(head), sort=False)
        keys = [*head, "seeds"]
        frame["seeds"] = groups[head[0]].transform("size").astype(str)
        again = frame.groupby(keys, sort=False)
        return cls(title, again.mean(numeric_only=True), again.sem(numeric_only=True), note)

    @classmethod
    def of_numbers(
        cls,
        title: str,
        head: Sequence[str],
        lines: Mapping[Any, Mapping[str, Number]],
        note: str = "",
    ) -> Table:
        """Numbers that are means already.

        Args:
            lines: the cells of the first columns, whose names are in `head`, to the numbers.
        """
        means, errors = (
            pd.DataFrame(
                [{name: pair[part] for name, pair in line.items()} for line in lines.values()]
            )
            for part in (0, 1)
        )
        means.index = errors.index = pd.MultiIndex.from_tuples(list(lines), names=list(head))
        return cls(title, means, errors, note)

    def text(self) -> pd.DataFrame:
        """What is shown: three digits, and the standard error behind "±"."""

        def shown(mean: float, error: float) -> str:
            if pd.isna(mean):
                return ""
            return f"{mean:.3f}" if pd.isna(error) else f"{mean:.3f} ± {error:.3f}"

        columns = {
            name: list(map(shown, self.means[name], self.errors[name])) for name in self.means
        }
        return pd.DataFrame(columns, index=self.means.index).reset_index()

    def markdown(self) -> str:
        """A heading, the table and its note."""
        text = self.text()
        lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
        shown = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
        shown[1] = shown[1].replace(" ", "")
        return "\n".join([f"## {self.title}", "", *shown, "", self.note]).rstrip()

    def csv(self) -> str:
        """Numbers in full, standard errors in columns of their own."""
        errors = self.errors.dropna(axis="columns", how="all").add_suffix(" se")
        both = self.means.join(errors)
        order = [name for column in self.means for name in (column, f"{column} se") if name in both]
        return str(both[order].to_csv())


DIFFERENCES = (
    "Standard errors over seeds; if there is one seed, over its test rows. p: a paired t-test over "
    "seeds, not corrected for the number of comparisons."
)


def difference(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> dict[str, Number]:
    """How much larger our losses are, and the p-value of a paired t-test on it.

    A seed has other rows to learn from and to be tested on. All of these come from one pool, so the
    seeds are not quite independent, and true p-values are somewhat larger.

    Args:
        ours, theirs: by seed, the losses (N,) of the same N test rows; at least one seed in both.

    >>> import torch
    >>> ours, theirs = torch.tensor([[[4.0], [5.0]], [[5.0], [8.0]]])  # two seeds of one row
    >>> difference(dict(enumerate(ours)), dict(enumerate(theirs)))["nll"]
    (-2.0, 1.0)
    """
    seeds = sorted(ours.keys() & theirs.keys())
    behind = [(ours[seed] - theirs[seed]).double() for seed in seeds]
    if len(seeds) == 1:
        return {"nll": mean_and_error(behind[0]), "p": (nan, nan)}
    means = [gap.mean().item() for gap in behind]
    p = 1.0 if not any(means) else float(stats.ttest_1samp(means, 0.0).pvalue)
    return {"nll": mean_and_error(means), "p": (p, nan)}


def publish(folder: Path, about: str, tables: Sequence[Table]) -> None:
    """Each table as CSV, all of them as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        stem = re.sub(r"[^\w.]+", "-", table.title).strip("-")
        (folder / f"{stem}.csv").write_text(table.csv())
    text = "\n\n".join([f"# {about}", *(table.markdown() for table in tables)])
    (folder / "tables.md").write_text(text + "\n")
