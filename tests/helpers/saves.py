"""Saved posteriors of the tiny transformer: loaded, and altered with digests that are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.posterior.saving import FILE, packed, read
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer


def load(folder: Path, **options: Any) -> Any:
    return bh.Posterior.load(folder, tiny_backbone(), tokenizer=tiny_tokenizer(), **options)


def backbone_in(folder: Path, model: Any = None) -> Path:
    """A folder with the tiny transformer, or with another model, and its tokenizer."""
    (tiny_backbone() if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def retensor(
    folder: Path, which: Callable[[str], bool], change: Callable[[Tensor], Tensor]
) -> None:
    """Alter some of the tensors."""
    plain, tensors = read(folder)
    tensors |= {name: change(tensors[name]) for name in tensors if which(name)}
    (folder / FILE).write_bytes(packed(plain, tensors))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Alter the plain part, as another version of the package would."""
    plain, tensors = read(folder)
    change(plain)
    (folder / FILE).write_bytes(packed(plain, tensors))
