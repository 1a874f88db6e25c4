"""How texts are read for a model, in every round and prediction alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..data import Columns, Examples, encode
from ..data.sources import read
from ..errors import DataError
from ..model.model import Model
from ..model.network import RandomPEFT
from ..peft.architectures import positions_of

__all__ = [
    "TextOptions",
]


@dataclass(frozen=True)
class TextOptions:
    """How text was read, so that new text is read the same way."""

    columns: Columns = Columns()
    max_length: int | None = None
    label_names: tuple[str, ...] | None = None

    def encode(
        self, model: Model, data: object, labelled: bool, new_names: bool = False
    ) -> Examples:
        """Tokenise `data` for a model; only a first round's may name the classes.

        Raises:
            DataError: as for `data.encode`; `max_length` is more than the backbone can read.
        """
        return encode(
            data,
            model.network.tokenizer,
            kind=model.likelihood.kind,
            columns=self.columns,
            label_names=self.label_names,
            num_labels=model.likelihood.num_labels(model.network.outputs),
            max_length=self.limit(model.network, data),
            labelled=labelled,
            new_names=new_names,
        )

    def encode_texts(self, model: Model, data: object) -> Examples:
        """`encode` the texts alone: labels, where there are any, are not looked at."""
        if not isinstance(data, Examples):
            kind = model.likelihood.kind
            rows = read(data, kind, self.columns, labelled=False)
            data = rows.select_columns(list(self.columns.inputs(kind)))
        return replace(self.encode(model, data, labelled=False), labels=None)

    def limit(self, network: RandomPEFT, data: object) -> int | None:
        """`max_length`; if there is none, what the backbone can read and its tokenizer allows.

        Raises:
            DataError: `max_length` is more than the backbone can read.
        """
        given, most = self.max_length, positions_of(network.backbone.base_model)
        if most is None:
            return given
        if given is None and isinstance(data, Examples):
            return most
        if given is None:
            return min(most, network.tokenizer.model_max_length)
        if isinstance(given, int) and given > most:
            raise DataError(
                f"max_length={given}: the backbone has positions for {most} tokens; expected at "
                "most so many"
            )
        return given
