"""The paper's three tasks as ready recipes: ratings, categories and multiple choice.

Each gives a `Model` with the hybrid of LoRA, adapter and prefix, a random head of the right size
and the likelihood that goes with it. They do little: take one apart for anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LikelihoodError
from ..peft import Kind
from ..priors import PriorLike
from .head import Head
from .likelihoods import Categorical, HeteroscedasticNormal, Likelihood, MultipleChoice, Normal
from .model import Model
from .network import RandomPEFT

__all__ = [
    "categories",
    "multiple_choice",
    "ratings",
]


def ratings(
    backbone: PreTrainedModel,
    low: float,
    high: float,
    *,
    noise_by_text: bool = False,
    kinds: Sequence[Kind] | None = None,
    prior: PriorLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Model:
    """Regression of ratings between `low` and `high` (sentiment in the paper; MSE and MAE).

    Args:
        backbone: the transformer.
        low, high: the ends of the scale; an output of +-2 stands for them.
        noise_by_text: let the noise depend on the text (aleatoric uncertainty of its own for
            each), instead of one noise scale that is learnt.
        kinds, prior, tokenizer: as for `RandomPEFT` and `Model`.

    Raises:
        LikelihoodError: low is not below high.

    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> model = ratings(tiny_backbone(), 1, 5)
    >>> model.likelihood
    Normal(center=3.0, spread=1.0)
    """
    if not low < high:
        raise LikelihoodError(f"ratings: low={low} must be below high={high}")
    kind = HeteroscedasticNormal if noise_by_text else Normal
    likelihood = kind(center=(low + high) / 2, spread=(high - low) / 4)
    return _model(backbone, 2 if noise_by_text else 1, likelihood, kinds, prior, tokenizer)


def categories(
    backbone: PreTrainedModel,
    count: int,
    *,
    kinds: Sequence[Kind] | None = None,
    prior: PriorLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Model:
    """Classification into `count` categories (news in the paper; accuracy and F1).

    >>> from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer
    >>> import bhpeft_pyro as bh
    >>> model = categories(tiny_backbone(), 2, tokenizer=tiny_tokenizer())
    >>> posterior = bh.fit(model, "normal", tiny_examples(), max_steps=2, progress=False)
    >>> posterior.predict(["w5 w7"], samples=2).probabilities.shape
    torch.Size([1, 2])
    """
    return _model(backbone, count, Categorical(), kinds, prior, tokenizer)


def multiple_choice(
    backbone: PreTrainedModel,
    *,
    kinds: Sequence[Kind] | None = None,
    prior: PriorLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Model:
    """The right one of 2 to 8 answers to a question (commonsense reasoning in the paper).

    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> multiple_choice(tiny_backbone()).network.outputs
    1
    """
    return _model(backbone, 1, MultipleChoice(), kinds, prior, tokenizer)


def _model(
    backbone: PreTrainedModel,
    outputs: int,
    likelihood: Likelihood,
    kinds: Sequence[Kind] | None,
    prior: PriorLike | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Model:
    return Model(RandomPEFT(backbone, kinds, Head(outputs), tokenizer), prior, likelihood)
