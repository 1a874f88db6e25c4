"""Examples as plain data and tensors, for files that are not pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .examples import Examples
from .tokens import Tokens

__all__ = ["describe", "revive"]

_TOKENS = ("ids", "types", "lengths")
_OWN = ("labels", "counts", "cut")
_PLAIN = ("kind", "texts", "label_names", "num_labels", "probe")


def describe(examples: Examples) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain data and tensors; `revive` makes the same examples of them.

    >>> from bhpeft_pyro.testing import tiny_examples
    >>> examples = tiny_examples(3)
    >>> revive(*describe(examples)).fingerprint == examples.fingerprint
    True
    """
    tokens = examples.tokens
    tensors = {name: getattr(tokens, name) for name in _TOKENS}
    tensors |= {name: getattr(examples, name) for name in _OWN}
    plain = {name: getattr(examples, name) for name in _PLAIN}
    plain |= {"pad": tokens.pad, "pad_type": tokens.pad_type}
    return plain, {name: tensor for name, tensor in tensors.items() if tensor is not None}


def revive(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Examples:
    """The examples that were described."""
    tokens = Tokens(
        **{name: tensors.get(name) for name in _TOKENS},  # type: ignore[arg-type]
        pad=plain["pad"],
        pad_type=plain["pad_type"],
    )
    own: dict[str, Any] = {name: tensors.get(name) for name in _OWN}
    names = plain["label_names"]
    return Examples(
        kind=plain["kind"],
        tokens=tokens,
        texts=tuple(plain["texts"]),
        label_names=None if names is None else tuple(names),
        num_labels=plain["num_labels"],
        probe=tuple(plain["probe"]),
        **own,
    )
