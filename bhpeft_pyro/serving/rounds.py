"""Which saved round is served, what it says of each text, and how one is loaded beside another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..base.isolation import locked
from ..base.names import Method
from ..base.progress import bars
from ..data import Examples
from ..data.columns import Kind
from ..data.encoding import token_limit
from ..decisions.promises import Promise
from ..errors import ConfigError, SaveError
from ..forecast.base import digits
from ..posterior import Posterior, saving
from ..prediction.predict import AnyForecast, in_closed_form
from ..streams import History
from ..streams.history import find

__all__ = ["Served", "Source", "rows_of"]

Table = Mapping[str, Sequence[Any]]
"""Columns of cells, as `Posterior.predict` takes them."""

Row = dict[str, Any]
"""What is said of a text: the columns of `bhpeft predict`, and `scores`, the probability of each
class, label or choice, the most probable first; ratings have none."""

_LONG = 64  # words of the longer text of a warm-up, at most


@dataclass(frozen=True, eq=False)
class Served:
    """A round that is loaded, and answers tables of texts.

    Attributes:
        posterior: that of the round.
        folder: where it is saved.
        method: how it predicts, as `Posterior.predict` takes it.
    """

    posterior: Posterior
    folder: Path
    method: Method | None = None

    @property
    def id(self) -> str:
        """The id of the round."""
        return self.posterior.report.id

    @property
    def kind(self) -> Kind:
        """Of what it predicts, "class", "labels", "rating" or "choice"."""
        return self.posterior.model.likelihood.kind

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that hold text, in reading order."""
        return self.posterior.columns.inputs(self.kind)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns of numbers that the likelihood reads."""
        given = {*self.posterior.columns.extra, *self.posterior.model.likelihood.columns}
        return tuple(sorted(given))

    @property
    def limit(self) -> int | None:
        """The most tokens of a text; longer ones are cut. None if there is no limit."""
        model, columns = self.posterior.model, self.posterior.columns
        return token_limit(model.network.tokenizer, model.limited(columns, ()), self.kind)

    @property
    def way(self) -> str:
        """How it predicts, as was asked for or by itself."""
        if self.method is not None:
            return self.method
        if self.posterior.student is not None:
            return "student"
        closed = in_closed_form(self.posterior.guides, None, drawn=False)
        return "exact" if closed else "draws"

    @property
    def promised(self) -> Promise | None:
        """The round's promise, if that is for how this predicts."""
        return None if self.no_promise else self.posterior.promised

    @property
    def no_promise(self) -> str | None:
        """Why nothing is promised of the answers; None if something is."""
        promised = self.posterior.promised
        if promised is None:
            return f"round {self.id} has no promise; bhpeft promise makes one"
        if promised.method != self.way:
            return f"the promise of round {self.id} is for --method {promised.method}"
        return None

    def encode(self, table: Table) -> Examples:
        """Tokens of the rows of a table.

        Raises:
            DataError: the table cannot be used; says why.
        """
        with bars(False):
            return self.posterior.encode(table, labelled=False)

    def longest(self, table: Table) -> int:
        """The tokens of the longest text of a table, before any is cut."""
        tokenizer: Any = self.posterior.model.network.tokenizer
        columns = [list(map(str, table[name])) for name in self.texts]
        with locked():
            tokens = tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        return max(map(len, tokens))

    def answer(self, examples: Examples) -> list[Row]:
        """What is said of each row of the examples."""
        with bars(False):
            forecast = self.posterior.predict(examples, method=self.method)
        return rows_of(forecast)

    @cached_property
    def sample(self) -> list[Row]:
        """Answers to a short and a long text. With them the first request does not wait for what is
        set up once; what cannot be answered in this way raises its error here."""
        words = " ".join(["the"] * min(_LONG, (self.limit or 4 * _LONG) // 4))
        table: dict[str, Sequence[Any]] = dict.fromkeys(self.texts, ("the", words))
        table |= dict.fromkeys(self.numbers, (1.0, 1.0))
        if self.kind == "choice":
            table[self.posterior.columns.choices] = (["the", "the"], [words, words])
        return self.answer(self.encode(table))


@dataclass(frozen=True)
class Source:
    """Where rounds come from, and how they are loaded.

    Args:
        run: the folder of a saved posterior, of a stream, or of several saved posteriors.
        backbone: where the backbone is, if it has moved.
        device: of the backbone, as for `Posterior.load`.
        method: how to predict, as for `Posterior.predict`.
        nearest: tell clients the learnt text that is most like theirs, of those that the posterior
            keeps. They could read most of these texts so.
    """

    run: Path
    backbone: str | None = None
    device: str = "auto"
    method: Method | None = None
    nearest: bool = False

    def find(self, name: str | None = None) -> Path:
        """The folder of a round.

        Args:
            name: its id or the beginning of it, or the name of its folder; None for the newest, by
                the time at which it was made.

        Raises:
            SaveError: there is no such round, or there are several.
        """
        if saving.exists(self.run):
            rounds = {saving.read_report(self.run).id: self.run}
        else:
            history = History.of(self.run)
            reports, folders = history.rounds, history.folders
            rounds = {id: folders[id] for id in sorted(reports, key=lambda id: reports[id].created)}
        if not rounds:
            raise SaveError(f"run: no saved posterior in {self.run}")
        if name is None:
            return [*rounds.values()][-1]
        return rounds[find(rounds, name, self.run)]

    def load(self, name: str | None = None, beside: Served | None = None) -> Served:
        """Load a round, and warm it up.

        Args:
            name: as for `find`.
            beside: the round that is served. Its backbone is used again if the new one stands on
                the same, so that both fit into memory.

        Raises:
            SaveError: there is no such round, or it is damaged.
            ConfigError: it cannot predict by the method, or answers other questions.
        """
        folder = self.find(name)
        posterior = None
        if beside is not None:
            network = beside.posterior.model.network
            with suppress(SaveError):  # it was fitted on another backbone
                posterior = Posterior.load(folder, network.backbone, tokenizer=network.tokenizer)
        if posterior is None:
            posterior = Posterior.load(folder, self.backbone, device=self.device)
        if not self.nearest and posterior.novelty is not None:
            posterior = posterior.replace(novelty=replace(posterior.novelty, texts=()))
        served = Served(posterior, folder, self.method)
        if beside is not None:
            _check_like(served, beside)
        _ = served.sample
        return served


def _check_like(new: Served, old: Served) -> None:
    """Refuse a round that answers other questions than the one that is served: clients would get
    what they do not expect."""
    asked = [(one.kind, one.texts, one.numbers) for one in (new, old)]
    if asked[0] != asked[1]:
        raise ConfigError(
            f"round: {new.id} predicts kind {new.kind!r} from {', '.join(new.texts)}; expected one "
            f"like {old.id}, kind {old.kind!r} from {', '.join(old.texts)}"
        )


def rows_of(forecast: AnyForecast) -> list[Row]:
    """What is said of each text that was predicted.

    >>> import torch
    >>> from bhpeft_pyro.forecast import ClassForecast
    >>> draws = torch.tensor([[[0.25, 0.75]]])
    >>> (row,) = rows_of(ClassForecast.from_draws(draws, label_names=["bad", "good"]))
    >>> row["prediction"], row["reason"], row["scores"]
    ('good', 'people may differ', {'good': 0.75, 'bad': 0.25})
    """
    table = forecast.table().drop(columns=["text", "label"], errors="ignore")
    rows: list[Any] = table.to_dict("records")
    probabilities: Any = getattr(forecast, "probabilities", None)
    if probabilities is None:
        return rows
    names: Any = getattr(forecast, "label_names", None) or range(probabilities.shape[1])
    choices = getattr(forecast, "choices", None)  # of which some texts have fewer
    counts = [len(names)] * len(forecast) if choices is None else choices.sum(1).tolist()
    for row, values, count in zip(rows, probabilities, counts, strict=True):
        named = zip(map(str, names), digits(values[:count]), strict=False)
        row["scores"] = dict(sorted(named, key=lambda pair: -pair[1]))
    return rows
