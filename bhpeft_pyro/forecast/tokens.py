"""How sure language models are of the tokens of a text, and how far they disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import Number, check
from ..errors import ConfigError
from .classes import entropy

__all__ = ["TokenForecast", "score_tokens"]


@dataclass(frozen=True, eq=False)
class TokenForecast:
    """T tokens of B texts under K members of a posterior; made by `score_tokens`.

    All values are 0 at padding, and at the first token of a text.

    Attributes:
        log_probs: (K, B, T) log p_k(token | tokens before it).
        total: (B, T) entropy in nats of the mean of the members' distributions of the token.
        aleatoric: (B, T) mean of the members' entropies.
        epistemic: (B, T) total - aleatoric, the mutual information between token and member, with
            all members equally likely at each token (Malinin and Gales 2021).
    """

    log_probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    @property
    def sequence(self) -> Tensor:
        """(B,) log of the mean of the members' probabilities of all T tokens together."""
        return self.log_probs.sum(-1).logsumexp(0) - math.log(len(self.log_probs))


@torch.no_grad()
def score_tokens(
    members: Iterable[AbstractContextManager[Any]],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    start: int = 1,
) -> TokenForecast:
    """Score texts under each member of a posterior over a causal language model's weights.

    Each member takes one forward pass over all texts, and memory for a few times B * T * V numbers
    with V tokens in the vocabulary.

    Args:
        members: context managers that give a model with the member's weights, such as
            `[posterior.bind(k) for k in range(3)]`, or `nullcontext(model)`.
        input_ids: (B, L) tokens, such as prompts with what `generate` has added.
        attention_mask: (B, L), 1 for tokens and 0 for padding on either side; by default all 1.
        start: the position of the first of the T = L - start tokens to score, such as the length of
            the prompts.

    Raises:
        ConfigError: there are no members, a model has no output layer for tokens, or a shape or
            `start` is wrong.

    >>> from contextlib import nullcontext
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)).eval()
    >>> score_tokens([nullcontext(model)], torch.tensor([[5, 7, 9, 11]]), start=2).log_probs.shape
    torch.Size([1, 1, 2])
    """
    check(input_ids, Tensor, "input_ids", "a tensor (texts, tokens)")
    check(members, Iterable, "members", "several context managers, such as [posterior.bind()]")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    shapes = (*input_ids.shape,), (*mask.shape,)
    if input_ids.ndim != 2 or len(set(shapes)) > 1:
        raise ConfigError(f"input_ids, attention_mask: {shapes}, expected two (texts, tokens)")
    start = Number(least=1, most=input_ids.shape[1] - 1, whole=True)("start", start)
    log_probs, entropies, mean = [], [], torch.zeros(())
    for member in members:
        expected = "context managers, such as posterior.bind() or nullcontext(model)"
        check(member, AbstractContextManager, "members", expected)
        with member as model:
            if model.get_output_embeddings() is None:
                name = type(model).__name__
                raise ConfigError(f"members: expected models of AutoModelForCausalLM, got {name}")
            logits = model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0),
                logits_to_keep=input_ids.shape[1] - start + 1,
            ).logits
        logs = logits[:, :-1].float().log_softmax(-1)
        log_probs.append(logs.gather(-1, input_ids[:, start:, None])[..., 0])
        probabilities = logs.exp()
        entropies.append(entropy(probabilities))
        mean = mean + probabilities
    if not log_probs:
        raise ConfigError("members: there are none; expected one or more")
    total, aleatoric = entropy(mean / len(log_probs)), torch.stack(entropies).mean(0)
    epistemic = (total - aleatoric).clamp_min(0)  # negative by rounding alone
    skipped = ~(mask[:, start:].bool() & mask[:, start - 1 : -1].bool())
    values = torch.stack(log_probs), total, aleatoric, epistemic
    return TokenForecast(*(value.masked_fill(skipped, 0.0).cpu() for value in values))
