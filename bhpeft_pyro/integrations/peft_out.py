"""From a posterior to adapters of the `peft` library, or to a plain classifier."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.files import alone, flush_folder, make_folder, naming, write
from ..errors import ConfigError, SaveError
from ..model.head import final_layer, set_final_layer
from ..model.network import RandomPEFT
from ..peft.hooks import bare_copy
from ..peft.kinds import rows_of
from ..posterior.posterior import Posterior
from ..posterior.predictor import Part
from .peft_in import CONFIG, Change, check_targets, library

__all__ = ["merge", "to_peft"]

_TENSORS = "adapter_model.safetensors"
_CLASSES, _LABELS = "single_label_classification", "multi_label_classification"  # problem types


def to_peft(posterior: Posterior, folder: str | Path, component: Part | None = None) -> Path:
    """Write a posterior's weights as adapters of the `peft` library, classifier included.

    `PeftModel.from_pretrained(backbone, folder)` gives the same logits, or mean ratings before they
    are cut to the ends of the scale (`forecast.free_mean`), with a backbone of
    `AutoModelForSequenceClassification.from_pretrained(..., num_labels=...)`.

    The adapters appear together, when all are written.

    Args:
        posterior: of LoRA alone, with a `ClassifierHead`.
        folder: of the adapter, a new or an empty one. Several adapters are written to its folders
            component-0, component-1 and so on: `model.load_adapter` takes one by one.
        component: of a mixture, the one to write; by default all. "student" writes that.

    Returns:
        The folder.

    Raises:
        ConfigError: adapter or prefix weights, or a `Head`, which `peft` has no counterpart for;
            several labels per text, or one, and a backbone whose config says otherwise
            (`problem_type`); no such component.
        LikelihoodError: it reads the outputs otherwise than a Hugging Face classifier.
        SaveError: the folder is not empty.
        WriteError: the disk is full, or it cannot be written for another reason.
    """
    folder = Path(folder)
    _check(posterior, "to_peft")
    network = posterior.model.network
    if not network.kinds:
        raise ConfigError(
            "to_peft: this posterior has no LoRA weights; merge() gives a plain classifier"
        )
    kind, problem = posterior.model.likelihood.kind, network.backbone.config.problem_type
    if kind == "labels" and problem != _LABELS:
        raise ConfigError(
            f"to_peft: an adapter does not say that a text may have several labels; expected a "
            f"backbone whose config has problem_type={_LABELS!r}; merge() gives one"
        )
    if kind == "class" and problem not in (None, _CLASSES):
        raise ConfigError(
            "to_peft: an adapter does not say that a text has one label; expected a backbone whose "
            f"config has problem_type={_CLASSES!r}, not {problem!r}; merge() gives one"
        )
    numbers = range(len(posterior.guides)) if component is None else (component,)
    likelihood = posterior.model.likelihood
    chosen = {
        f"component-{number}": likelihood.exported(posterior.weights(number)) for number in numbers
    }
    if folder.exists() and any(folder.iterdir()):
        raise SaveError(f"folder: {folder} is not empty; expected a new or an empty folder")
    goal = folder.resolve()
    new = goal.with_name(f".{goal.name}.new")  # the next export takes what a kill leaves of it
    with naming(folder):
        make_folder(goal.parent)
        with alone(goal):
            shutil.rmtree(new, ignore_errors=True)
            for name, values in chosen.items():
                _write(network, values, new, "" if len(chosen) == 1 else name)
            new.rename(goal)
            flush_folder(goal.parent)
    return folder


def merge(posterior: Posterior, component: Part | None = None) -> PreTrainedModel:
    """A plain Hugging Face classifier with the posterior's central values merged into its weights.

    It gives the same logits, or mean ratings before they are cut to the ends of the scale
    (`forecast.free_mean`). It knows the names of the classes (`id2label`), and can be saved by
    `save_pretrained`; none of this package is needed to use it.

    Args:
        posterior: of LoRA alone, or of a head alone, with a `ClassifierHead`.
        component: of a mixture, the one to merge; or "student".

    Raises:
        ConfigError: adapter, prefix or gated weights, which cannot be merged into frozen weights; a
            `Head`; a quantised backbone; several components, and none chosen.
        LikelihoodError: as for `to_peft`.
    """
    _check(posterior, "merge")
    network, values = posterior.model.network, posterior.weights(component)
    values = posterior.model.likelihood.exported(values)
    model = bare_copy(network.backbone)
    for name, (down, up, scale) in _modules(network, values).items():
        module = model.get_submodule(name)
        weight = module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ConfigError(f"merge: {name} is quantised ({type(module).__name__})")
        change = scale * up @ down
        change = change.mT if isinstance(module, Conv1D) else change
        weight.data = (weight.float() + change).to(weight.dtype)
    set_final_layer(model, values["head.weight"], values.get("head.bias"))
    names = posterior.columns.label_names
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {label: i for i, label in enumerate(names)}
    types: dict[str, Any] = {"class": _CLASSES, "labels": _LABELS, "rating": "regression"}
    if (kind := posterior.model.likelihood.kind) in types:
        model.config.problem_type = types[kind]
    return model.requires_grad_(True)


def _check(posterior: Posterior, what: str) -> None:
    """Refuse a posterior that cannot be exported."""
    network = posterior.model.network
    if not network.head.mergeable:
        raise ConfigError(
            f"{what}: a {type(network.head).__name__} pools and standardises in a way of its own; "
            "expected a ClassifierHead on a model of AutoModelForSequenceClassification; fit again "
            f"with bh.RandomPEFT(model, bh.presets.lora(), bh.ClassifierHead({network.outputs}))"
        )
    for kind in network.kinds:
        if kind.name != "lora" or kind.gated:
            name = f"gated {kind.name}" if kind.gated else kind.name
            reason = "cannot be merged into weights" if what == "merge" else "is unknown to peft"
            raise ConfigError(f"{what}: {name} {reason}; expected LoRA alone, ungated")
    check_targets(network)


def _modules(network: RandomPEFT, values: Mapping[str, Tensor]) -> dict[str, Change]:
    """LoRA on each module by its name: one A, B and scale; of a fused one, all parts together."""
    names = {module: name for name, module in network.backbone.named_modules()}
    weights = network.coordinates(
        {site.name: values[site.name].unsqueeze(0) for site in network.sites}
    )
    rows = rows_of(network.attachment.sites, weights)
    return {
        names[module]: (a[0], b[0], scale)
        for kind, layers in network.attachment.placed
        for layer in layers
        for module, (a, b, scale) in kind.products(rows, layer).items()
    }


def _write(network: RandomPEFT, values: Mapping[str, Tensor], folder: Path, place: str) -> None:
    """One adapter in the format of `peft`, at a place in the folder."""
    peft = library()
    backbone = network.backbone
    modules = _modules(network, values)
    last, inside = final_layer(backbone)[0], f"{backbone.base_model_prefix}."
    head = {f"{last}.{site[5:]}": values[site] for site in values if site.startswith("head.")}
    kept = dict(network.head.tail(backbone)) | head
    tensors = {f"{name}.lora_A.weight": down for name, (down, _, _) in modules.items()}
    tensors |= {f"{name}.lora_B.weight": up for name, (_, up, _) in modules.items()}
    ranks = {name: len(down) for name, (down, _, _) in modules.items()}
    alphas = {name: ranks[name] * scale for name, (_, _, scale) in modules.items()}
    rank, alpha = next(zip(ranks.values(), alphas.values(), strict=True))
    transposed = any(isinstance(backbone.get_submodule(name), Conv1D) for name in modules)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        base_model_name_or_path=backbone.config._name_or_path,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules),
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        fan_in_fan_out=transposed,
        modules_to_save=sorted(
            {f"{inside}pooler" if key.startswith(inside) else key.split(".")[0] for key in kept}
        ),
    )
    data = {f"base_model.model.{key}": value for key, value in {**tensors, **kept}.items()}
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in data.items()}
    folder /= place
    make_folder(folder)
    config.save_pretrained(str(folder))
    write(folder / CONFIG, (folder / CONFIG).read_bytes())  # so that it is on the disk
    write(folder / _TENSORS, dump_tensors(plain, metadata={"format": "pt"}))
