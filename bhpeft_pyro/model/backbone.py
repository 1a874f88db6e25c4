"""The frozen transformer: by name with its tokenizer, whether it is whole, and which it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
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
from ..data.encoding import probe_of
from ..errors import ArchitectureError, ConfigError, SaveError, is_out_of_memory
from ..peft.signals import token_limits

if TYPE_CHECKING:
    from .network import RandomPEFT

__all__ = ["load_backbone"]

# Names of models from PyPI: a folder, or a GGUF file.
LOCAL = {"minilm": assets.minilm, "mpnet": assets.mpnet, "smollm2": assets.smollm2}

_FIXED = 128  # tokens of the longest fixed text
_KEPT = 16  # numbers that are kept of each text's output
_ROUNDING = 5e-4  # of outputs, by which devices and versions of torch may differ


def load_backbone(
    name: str, device: str = "auto", classifier: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a transformer and its tokenizer. No code that comes with a checkpoint is run.

    A posterior that is saved with it keeps `name`; folders and files as absolute paths.

    Args:
        name: a name on the Hugging Face hub, a folder, a GGUF file, "minilm", "mpnet", or
            "smollm2".
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        classifier: load a sequence classifier, for a `ClassifierHead`.

    Raises:
        ConfigError: there is no such model or device, or its files are damaged.
        ArchitectureError: transformers does not have the code of this model.
    """
    place = device_named(device)
    source, options = _located(name)
    if source == name and not Path(source).exists():
        with assets.hub_or_cache():
            return _loaded(name, source, options, place, classifier)
    return _loaded(name, source, options, place, classifier)


def _loaded(
    name: str, source: str, options: dict[str, Any], place: torch.device, classifier: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        config = AutoConfig.from_pretrained(source, **options)
        # Only the encoder of T5 and similar models.
        auto: Any = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        auto = AutoModelForSequenceClassification if classifier else auto
        model = auto.from_pretrained(source, **options)
    except ImportError as error:
        raise ConfigError(f"backbone: {name!r}: {_first_line(error)}") from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"backbone: {name!r} is not a folder with a model and cannot be loaded from the hub "
            f"({_first_line(error)}); {', '.join(map(repr, LOCAL))} come from PyPI and need no hub"
        ) from error
    except (ValueError, KeyError) as error:
        raise ArchitectureError(f"backbone: {name!r}: {_first_line(error)}") from error
    except Exception as error:  # of damaged files; transformers raises whatever it stumbles over
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"backbone: the configuration or the weights of {name!r} are damaged "
            f"({_first_line(error):.120}); expected a whole checkpoint"
        ) from error
    path = Path(os.path.expanduser(name))
    given_path = name not in LOCAL and path.exists()
    model.config._name_or_path = str(path.resolve()) if given_path else name
    return model.to(place), _tokenizer(name, source, options)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformer, by a name that `load_backbone` takes.

    Raises:
        ConfigError: there is none.
    """
    return _tokenizer(name, *_located(name))


def _tokenizer(name: str, source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        probe_of(tokenizer)  # of a damaged one, the first use fails
    except Exception as error:  # tokenizers raises no other
        raise ConfigError(
            f"tokenizer: none can be loaded for the backbone {name!r} ({_first_line(error)}); "
            "expected a folder that has one; in Python, tokenizer=..."
        ) from error
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _located(name: str) -> tuple[str, dict[str, Any]]:
    """The folder or name on the hub from which transformers loads, and its options."""
    # `Path.expanduser` raises for a user that there is not.
    path = LOCAL[name]() if name in LOCAL else Path(os.path.expanduser(name))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"backbone: {name!r} is neither a file nor a folder")
    options: dict[str, Any] = {"trust_remote_code": False}
    if path.is_file():
        return str(path.parent), options | {"gguf_file": path.name}
    return str(path) if path.exists() else name, options


def check_weights(backbone: PreTrainedModel) -> None:
    """Refuse a damaged or changed backbone; of quantised weights only the scales are looked at."""
    check_plain(backbone)
    for name, weight in backbone.base_model.named_parameters():
        if weight.is_meta:
            raise ConfigError(
                f"backbone: its weights {name!r} were offloaded to the CPU or to disk; expected "
                "all of them in memory: load it quantised, or with a device_map over accelerators"
            )
        if weight.is_inference():
            raise ConfigError(
                "backbone: it was made under torch.inference_mode, so it lets no gradient through; "
                "expected one that was loaded outside"
            )
        # One pass without a copy. Poolers and the like are not used (`fingerprint`).
        plain = type(weight.data) is Tensor and weight.is_floating_point()
        if name.startswith("pooler.") or not plain:
            continue
        if not weight.detach().sum(dtype=torch.float32).isfinite():
            raise ConfigError(
                f"backbone: its weights {name!r} are not finite; expected a whole checkpoint"
            )


def check_plain(backbone: PreTrainedModel) -> None:
    """Refuse a model that the peft library has changed in place."""
    if any(name.endswith(".base_layer") for name, _ in backbone.named_modules()):
        raise ConfigError(
            "backbone: it carries an adapter of the peft library, which changes a model in place; "
            "expected the model loaded again, or bh.from_peft of the PeftModel"
        )


def fingerprint(network: RandomPEFT) -> dict[str, Any]:
    """The name of a backbone, and numbers by which what it computes is known again, and the
    tokenizer. Those are some of what the head reads of four padded texts of several lengths,
    without PEFT weights.

    The tokens are from the whole vocabulary, the same on every machine and whatever the
    configuration says of special tokens.
    """
    backbone = network.backbone
    base: Any = backbone.base_model
    vocabulary, length = token_limits(base, _FIXED)
    lengths = torch.tensor([length, 2 * length // 3, length // 4, 1]).clamp_min(1)
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    # A large prime, so that neighbours are far apart.
    ids = torch.arange(mask.numel()).reshape(mask.shape) * 2_654_435_761 % vocabulary * mask
    mask = mask.to(backbone.device)
    inputs = network.accepted({"input_ids": ids.to(backbone.device), "attention_mask": mask})
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        with torch.no_grad(), torch.autocast(backbone.device.type, enabled=False):
            features = network.head.read(backbone, inputs, mask, network.causal)
    finally:
        for module in training:
            module.training = True
    kept = features[:, :: max(1, features.shape[1] // _KEPT)]
    outputs = [[float(f"{value:.6g}") for value in row] for row in kept.cpu().tolist()]
    return {"name": saved_name(backbone), "outputs": outputs, "tokenizer": network.probe()}


def check_fingerprint(network: RandomPEFT, saved: Mapping[str, Any]) -> None:
    """Refuse a backbone that computes something else than the one whose `fingerprint` was saved,
    and another tokenizer.

    Devices, attention functions and versions of torch differ by rounding, which is allowed for:
    0.05 %, or ten units of the last place of the backbone's dtype, which are 8 % in bfloat16.
    Faster products of matrices (TF32) count as that.

    Raises:
        SaveError: the outputs or the tokens differ.
    """
    backbone, now = network.backbone, fingerprint(network)
    outputs, known = (torch.tensor(part["outputs"], dtype=torch.float64) for part in (now, saved))
    exact = torch.get_float32_matmul_precision() == "highest"
    dtype = backbone.dtype if exact else torch.bfloat16
    tolerance = max(_ROUNDING, 10 * torch.finfo(dtype).eps)
    if outputs.shape != known.shape or not (outputs - known).norm() <= tolerance * known.norm():
        raise SaveError(
            f"backbone: this posterior was fitted on another one ({saved['name'] or 'unnamed'!r}); "
            f"what {now['name'] or 'the one given'!r} computes, in {backbone.dtype}, differs: its "
            "weights are others, or a setting of its configuration"
        )
    if None not in (tokens := [now["tokenizer"], saved["tokenizer"]]) and tokens[0] != tokens[1]:
        raise SaveError("tokenizer: this posterior was fitted with another one; expected that")


def saved_name(backbone: PreTrainedModel) -> str:
    """The name by which a backbone can be loaded again here: of a folder its absolute path."""
    name: str = backbone.config._name_or_path
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def shared_name(backbone: PreTrainedModel) -> str | None:
    """The name by which a backbone can be loaded elsewhere; None for a folder, even one that is
    gone, or one without a name."""
    name = saved_name(backbone)
    return None if not name or Path(name).is_absolute() or name.startswith((".", "~")) else name


def device_named(name: str) -> torch.device:
    """ "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    available = torch.cuda.is_available()
    names = ("auto", "cpu", "cuda") if available else ("auto", "cpu")
    if name not in names and not (available and name.startswith("cuda:")):
        raise ConfigError(f"device={name!r}: expected one of {', '.join(names)}")
    if name == "auto":
        name = "cuda" if available else "cpu"
    return torch.device(name)
