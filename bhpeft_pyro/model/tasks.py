"""The paper's three tasks as ready recipes: ratings, categories and multiple choice.

Each gives a `Model` with the hybrid of LoRA, adapter and prefix, a random head of the right size
and the likelihood that goes with it. For anything else, build the `Model` yourself.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..peft import Kind
from ..priors import PriorLike
from .head import Head
from .likelihoods import Categorical, HeteroscedasticNormal, MultiLabel, MultipleChoice
from .model import Model
from .network import RandomPEFT

__all__ = ["categories", "multiple_choice", "ratings"]


def ratings(
    backbone: PreTrainedModel | str,
    low: float,
    high: float,
    *,
    limits: bool = False,
    kinds: Sequence[Kind] | None = None,
    prior: PriorLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Model:
    """Regression of ratings between `low` and `high` (sentiment in the paper; MSE and MAE), with a
    noise scale for each text.

    Args:
        low, high: the ends of the scale; outputs of -2 and 2 stand for them.
        limits: whether no rating can be beyond them; means and intervals of forecasts end there.
        backbone, kinds, prior, tokenizer: as for `RandomPEFT` and `Model`.

    Raises:
        ConfigError: `low` is not below `high`.

    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> ratings(tiny_backbone(), 1, 5).likelihood
    HeteroscedasticNormal(center=3.0, spread=1.0)
    """
    center, spread = (low + high) / 2, (high - low) / 4
    ends = {"low": low, "high": high} if limits else {}
    likelihood = HeteroscedasticNormal(center, spread, **ends)
    return Model(RandomPEFT(backbone, kinds, Head(2), tokenizer), prior, likelihood)


def categories(
    backbone: PreTrainedModel | str,
    num_labels: int,
    *,
    several: bool = False,
    kinds: Sequence[Kind] | None = None,
    prior: PriorLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Model:
    """Classification into `num_labels` categories (news in the paper; accuracy and F1).

    Args:
        num_labels: the number of categories.
        several: whether a text may have any number of them, instead of one.
        backbone, kinds, prior, tokenizer: as for `RandomPEFT` and `Model`.

    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> categories(tiny_backbone(), num_labels=3).network.outputs
    3
    """
    likelihood = MultiLabel() if several else Categorical()
    return Model(RandomPEFT(backbone, kinds, Head(num_labels), tokenizer), prior, likelihood)


def multiple_choice(
    backbone: PreTrainedModel | str,
    *,
    kinds: Sequence[Kind] | None = None,
    prior: PriorLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Model:
    """The right one of 2 to 8 answers to a question (commonsense reasoning in the paper).

    Args:
        backbone, kinds, prior, tokenizer: as for `RandomPEFT` and `Model`.

    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> multiple_choice(tiny_backbone()).network.outputs
    1
    """
    return Model(RandomPEFT(backbone, kinds, Head(1), tokenizer), prior, MultipleChoice())
