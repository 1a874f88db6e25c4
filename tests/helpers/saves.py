"""Saved posteriors of the tiny transformer: loaded, and altered with a checksum that is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.posterior.saving import INDEX, digest_of
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
    """Alter some of the tensors and mend the checksums."""
    (file,) = folder.glob("posterior-*.safetensors")
    tensors = load_file(file)
    data = save(tensors | {name: change(tensors[name]) for name in tensors if which(name)})
    digest = hashlib.sha256(data).hexdigest()
    new = file.rename(folder / f"posterior-{digest[:16]}.safetensors")
    new.write_bytes(data)
    index = {"file": new.name, "sha256": digest, "bytes": len(data)}
    rewrite(folder, lambda content: content.update(tensors=index))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Alter the index and mend its checksum, as another version of the package would."""
    index = folder / INDEX
    content = json.loads(index.read_bytes())["content"]
    change(content)
    index.write_text(json.dumps({"sha256": digest_of(content), "content": content}))
