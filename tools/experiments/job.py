"""What every method is given, and what it leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.model.backbone import device_named, load_backbone
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft import Kind
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior
from bhpeft_pyro.prediction.predict import AnyForecast
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

from .budgets import Budget
from .tasks import Task

__all__ = ["Fitted", "Inference", "Job", "Load", "load_frozen"]

Frozen = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Load = Callable[[], Frozen]


def load_frozen(name: str, device: str) -> Frozen:
    """A frozen transformer: "tiny", "random:LAYERSxWIDTH" (a BERT), or what `load_backbone` takes.

    Raises:
        ConfigError: there is none of this name.

    >>> load_frozen("random:3x128", "cpu")[0].config.num_attention_heads
    2
    """
    if name != "tiny" and not name.startswith("random:"):
        return load_backbone(name, device)
    backbone: Any = tiny_backbone() if name == "tiny" else _random(name)
    return backbone.to(device_named(device)), tiny_tokenizer()


def _random(name: str) -> BertModel:
    size = re.fullmatch(r"random:([1-9]\d*)x([1-9]\d*)", name)
    if size is None or int(size[2]) % 64:
        raise ConfigError(
            f"--backbone: {name!r}; expected random:LAYERSxWIDTH, a width of 64 or a multiple"
        )
    depth, width = map(int, size.groups())
    shape = {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": 4 * width}
    return BertModel(BertConfig.from_dict(shape | {"num_attention_heads": width // 64}))


@dataclass(frozen=True)
class Job:
    """What a method is given. Of the test rows it sees the texts alone, and only to predict.

    Attributes:
        task: what is learnt.
        kinds: the PEFT weights.
        load: makes a new copy of the frozen transformer.
        train, validation: labelled rows.
        unlabelled: other texts.
        seed: of the fits and the draws.
        budget: how much may be done.
    """

    task: Task
    kinds: Sequence[Kind]
    load: Load
    train: Dataset
    validation: Dataset
    unlabelled: Dataset
    seed: int
    budget: Budget

    def model(self) -> Model:
        """A model that is not fitted."""
        backbone, tokenizer = self.load()
        head = Head(self.task.outputs)
        network = RandomPEFT(backbone, tuple(self.kinds), head, tokenizer)
        return Model(network, None, self.task.likelihood())

    def fit(self, model: Model, guide: Any, **options: Any) -> Posterior:
        """As many steps for every method."""
        return fit(
            model,
            guide,
            self.train,
            columns=replace(self.task.columns, max_length=self.task.max_length),
            **{"max_steps": self.budget.steps, "seed": self.seed, "progress": False, **options},
        )


@dataclass(frozen=True)
class Fitted:
    """What a method has learnt.

    Attributes:
        predict: from rows to a forecast, with its draws where there are any.
        posterior: what predicts.
        facts: plain data about the fit.
    """

    predict: Callable[[Dataset], AnyForecast]
    posterior: Posterior
    facts: dict[str, Any] = field(default_factory=dict)


Inference = Callable[[Job], Fitted]
