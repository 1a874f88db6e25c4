"""From an adapter of the `peft` library, or a classifier, to a posterior.

It rests on `ClassifierHead`: the model runs as Hugging Face wrote it, and LoRA weights and the last
linear layer mean the same on both sides.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.checks import optional_library
from ..base.fit_options import FitOptions
from ..base.isolation import locked, seeded, with_gradients
from ..data import Columns
from ..errors import ArchitectureError, ConfigError, DataError, is_out_of_memory
from ..guides import MeanFieldGuide
from ..model.backbone import check_plain, load_backbone, load_tokenizer
from ..model.head import ClassifierHead, final_layer, set_final_layer, with_tail
from ..model.likelihoods import Categorical, Likelihood, MultiLabel, Normal
from ..model.model import Model
from ..model.network import RandomPEFT
from ..peft import LoRA
from ..peft.architectures import architecture_of, layers_of
from ..posterior.posterior import Posterior
from ..training.report import FitReport

__all__ = ["from_peft"]

Change = tuple[Tensor, Tensor, float]
"""LoRA's A (r, in), B (out, r) and scale on one module."""

CONFIG = "adapter_config.json"
_KEEP = ("gaussian", "eva", "orthogonal")  # initialisations that leave the frozen weights alone


@locked()
@with_gradients()
def from_peft(
    adapter: Any,
    data: object | None = None,
    *,
    validation: object | None = None,
    backbone: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: Columns = Columns(),
) -> Posterior:
    """A classifier that is trained already, as a posterior: nothing is trained anew.

    Without data it is a point estimate (a "delta" guide) with the logits of the model given. With
    data it is a Laplace approximation around it (`Posterior.widen`): the same weights, a width and,
    with `validation`, an output scale. How it was trained need not be known.

    Args:
        adapter: a `peft.PeftModel`, or the folder of a saved one, with LoRA on any of the layers
            that `peft.LoRA` supports. It is left as it is, and shares its frozen weights, so do not
            merge it later. Or a fully fine-tuned sequence classifier, which becomes the frozen
            backbone; its last layer alone becomes random.
        data: what it was trained on, as for `fit`.
        validation: rows it was not trained on, which choose the width and the output scale.
            Without, the prior's precision counts once (tau = 1), and logits stay as they are.
        backbone: of a folder, the plain classifier under the adapter; by default the checkpoint
            that the adapter names.
        tokenizer: by default the one in the adapter's folder, or that of the backbone's checkpoint.
        columns: how data are read. The classes are named by the model's `id2label`, unless
            `label_names` are given; one output is a rating.

    Raises:
        ConfigError: `peft` is not installed; `validation` comes without `data`; or the adapter is
            of a kind that has no exact counterpart here (DoRA, trained biases, several active
            adapters, and so on).
        ArchitectureError: a layer that this package has no LoRA for, such as an embedding.
        DataError: the adapter holds no classifier, and no backbone is given; or as for `widen`.

    >>> from peft import LoraConfig, get_peft_model
    >>> from bhpeft_pyro.testing import tiny_classifier, tiny_examples, tiny_tokenizer
    >>> config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    >>> trained = get_peft_model(tiny_classifier(), config)
    >>> posterior = from_peft(trained, tiny_examples(), tokenizer=tiny_tokenizer())
    >>> posterior.predict(["w5 w20"]).probabilities.shape
    torch.Size([1, 2])
    """
    if data is None and validation is not None:
        raise ConfigError("validation: a point estimate has no width to choose; expected data too")
    name = str(adapter) if isinstance(adapter, str | Path) else type(adapter).__name__
    if isinstance(adapter, str | Path):
        adapter, tokenizer = _loaded(Path(adapter), backbone, tokenizer)
    elif backbone is not None:
        raise ConfigError("backbone: it is for the folder of an adapter; a model brings its own")
    changes: dict[str, Change] = {}
    if not isinstance(adapter, PreTrainedModel):
        adapter, changes = _unwrapped(adapter)
    final = final_layer(adapter)[1]
    likelihood = _likelihood(adapter, final.out_features)
    kinds, values = _lora(adapter, changes)
    network = RandomPEFT(adapter, kinds, ClassifierHead(final.out_features), tokenizer)
    check_targets(network)
    values = {
        key: value if (anchor := network.coordinates.anchor(key)) is None else value - anchor
        for key, value in values.items()
    }
    values["head.weight"] = final.weight
    if final.bias is not None:
        values["head.bias"] = final.bias
    model = Model(network, likelihood=likelihood)
    if columns.label_names is None and likelihood.kind in ("class", "labels"):
        columns = replace(columns, label_names=_label_names(adapter))
    with seeded(0):
        guide = MeanFieldGuide(model, "delta")
    guide.move({key: value.detach().float() for key, value in values.items()})
    network.in_use = True
    report = FitReport(0, "", FitOptions(), temperature=0.0, point=True, name=Path(name).name)
    first = [model.prior]
    posterior = Posterior(model, [guide], (report,), columns, first, first)
    return posterior if data is None else posterior.widen(data, validation=validation)


def library() -> Any:
    """The `peft` library, which is optional and slow to import."""
    return optional_library("peft", "peft")


def _loaded(
    folder: Path, backbone: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The `PeftModel` in a folder, on a copy of the backbone that shares its transformer."""
    peft = library()
    if not (folder / CONFIG).exists():
        raise ConfigError(f"adapter: {folder} has no {CONFIG}; expected the folder of an adapter")
    with _refusing(f"{folder / CONFIG} cannot be read"):
        config = peft.PeftConfig.from_pretrained(str(folder))
    if tokenizer is None and (folder / "tokenizer_config.json").exists():
        tokenizer = load_tokenizer(str(folder))
    given = backbone
    if backbone is None:
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"adapter: {folder} does not say which model it was trained on; expected backbone="
            )
        backbone, its_tokenizer = load_backbone(config.base_model_name_or_path, classifier=True)
        tokenizer = tokenizer or its_tokenizer
    check_plain(backbone)
    name, final = final_layer(backbone)
    backbone = with_tail(backbone, ClassifierHead(final.out_features).tail(backbone))
    with _refusing(f"the weights in {folder} cannot be read"):
        saved = peft.load_peft_weights(str(folder), device="cpu")
    if bad := [key for key, value in saved.items() if not value.isfinite().all()]:
        raise ConfigError(f"adapter: in {folder} the weights {bad[0]!r} are not finite")
    weight = saved.get(f"base_model.model.{name}.weight")
    if weight is None and given is None:
        raise DataError(
            f"adapter: {folder} holds no weights for {name!r} (its modules_to_save is "
            f"{config.modules_to_save}); expected backbone=, the classifier it was trained on"
        )
    with _refusing(
        f"{folder} does not fit the backbone, a {type(backbone).__name__}; expected the model that "
        "it was trained on, and whole files"
    ):
        if weight is not None:  # as many labels as the adapter was trained with
            set_final_layer(backbone, weight, saved.get(f"base_model.model.{name}.bias"))
        return peft.PeftModel.from_pretrained(backbone, str(folder)), tokenizer


@contextmanager
def _refusing(fault: str) -> Iterator[None]:
    """Of damaged files, or files of another model, peft raises whatever it stumbles over."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"adapter: {fault}: {error}") from error


def _unwrapped(model: Any) -> tuple[PreTrainedModel, dict[str, Change]]:
    """The plain classifier under a `PeftModel`, and its LoRA by the name of the module.

    It is a copy that shares the frozen transformer. What the adapter has trained between that and
    the last layer is in it, LoRA merged.
    """
    peft = library()
    if not isinstance(model, peft.PeftModel):
        raise ConfigError(
            "adapter: expected a folder, a peft.PeftModel or a transformers model, got "
            f"{type(model).__name__}"
        )
    inner = model.get_base_model()
    final_layer(inner)
    name = _active(model)
    transformer = inner.base_model.state_dict(keep_vars=True)
    shared: dict[int, Any] = {
        id(value): value for key, value in transformer.items() if not key.startswith("pooler.")
    }
    twin = copy.deepcopy(model, shared)
    plain = twin.get_base_model()
    inside = f"{plain.base_model_prefix}."
    changes: dict[str, Change] = {}
    for where, module in plain.named_modules():
        frozen = where.startswith(inside) and not where.startswith(f"{inside}pooler")
        if frozen and isinstance(module, peft.utils.AuxiliaryTrainingWrapper):
            raise ArchitectureError(
                f"adapter: it trains {where!r}, which is part of the frozen transformer here; "
                "expected LoRA there"
            )
        if not isinstance(module, peft.tuners.lora.LoraLayer) or name not in module.r:
            continue
        if variant := module.lora_variant.get(name):
            raise _refused(f"{type(variant).__name__} on {where}", "is not plain LoRA")
        if not frozen:
            module.merge(adapter_names=[name])
        elif name not in module.lora_A:
            raise _unsupported([where])
        else:
            a, b = (side[name].weight.detach().float() for side in (module.lora_A, module.lora_B))
            changes[where] = a, b, float(module.scaling[name])
    return twin.base_model.unload(), changes


def _active(model: Any) -> str:
    """The name of the adapter in force, if it is one that has an exact counterpart here."""
    active = model.active_adapters
    if len(active) != 1:
        raise _refused(f"{len(active)} active adapters {active}", "expected a single one")
    (name,) = active
    config = model.peft_config[name]
    if config.peft_type != "LORA":
        raise _refused(
            f"an adapter of the type {config.peft_type.value}", "only LoRA has a counterpart"
        )
    start = config.init_lora_weights
    merged = any(getattr(module, "merged", False) for module in model.modules())
    off = any(getattr(module, "_disable_adapters", False) for module in model.modules())
    for wrong, what, reason in (
        (config.use_dora, "DoRA", "its magnitudes scale the frozen weights too"),
        (config.bias != "none", f"bias={config.bias!r}", "it trains biases of the transformer"),
        (config.lora_bias, "lora_bias", "its branches have a bias"),
        (config.layer_replication, "layer_replication", "it adds layers"),
        (
            isinstance(start, str) and start.lower() not in _KEEP,
            f"init_lora_weights={start!r}",
            "it may change the frozen weights; save it with "
            "path_initial_model_for_weight_conversion, and give that folder",
        ),
        (merged, "a merged adapter", "call unmerge_adapter() first"),
        (off, "an adapter that is switched off", "call enable_adapter_layers() first"),
    ):
        if wrong:
            raise _refused(what, reason)
    return name


def _refused(what: str, reason: str) -> ConfigError:
    return ConfigError(f"adapter: {what} cannot become a posterior: {reason}")


def _unsupported(names: Sequence[str]) -> ArchitectureError:
    return ArchitectureError(
        f"adapter: LoRA on {', '.join(names)} has no counterpart here; expected the projections of "
        "attention and feed-forward blocks"
    )


def check_targets(network: RandomPEFT) -> None:
    """Refuse projections that also project relative positions, on which LoRA does not act here."""
    config = network.backbone.config
    shared = architecture_of(config.model_type).positions and config.share_att_key
    targets = {site.name.split(".")[1] for site in network.attachment.sites if shared}
    for target in ("query", "key"):
        if target in targets:
            raise ArchitectureError(
                f"lora: in {config.model_type!r} {target!r} also projects relative positions, "
                "which LoRA of peft and merged weights change, and LoRA here does not; expected "
                "other targets"
            )


def _likelihood(model: PreTrainedModel, outputs: int) -> Likelihood:
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        return MultiLabel()
    if problem == "regression" and outputs > 1:
        raise _refused(f"a regression with {outputs} outputs", "a rating has one")
    return Categorical() if outputs > 1 else Normal(0.0, 1.0)


def _label_names(model: PreTrainedModel) -> list[str] | None:
    """The classes' names, unless they are the ones that transformers makes up."""
    named: Any = model.config.id2label
    names = [str(named[i]) for i in sorted(named)]
    made_up = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    fits = len(names) == final_layer(model)[1].out_features
    return names if fits and not made_up else None


def _lora(
    model: PreTrainedModel, changes: Mapping[str, Change]
) -> tuple[tuple[LoRA, ...], dict[str, Tensor]]:
    """One `LoRA` that makes the changes of an adapter, and its weights.

    Where ranks differ, the smaller are filled up with zeros; where scales differ, B makes up for
    it.
    """
    if not changes:
        return (), {}
    every = layers_of(cast(PreTrainedModel, model.base_model))
    names = {module: name for name, module in model.named_modules()}
    places = [
        (layer.number, target, projection, name)
        for layer in every
        for target, projection in layer.projections.items()
        if (name := names[projection.module]) in changes
    ]
    if left := changes.keys() - {name for *_, name in places}:
        raise _unsupported(sorted(left))
    numbers = sorted({number for number, *_ in places})
    rank = max(len(a) for a, _, _ in changes.values())
    common = next(iter(changes.values()))[2]
    values: dict[str, Tensor] = {}
    for number, target, projection, name in places:
        a, b, scale = changes[name]
        for side, shape in (("A", (rank, projection.inputs)), ("B", (projection.outputs, rank))):
            empty = torch.zeros(len(numbers), *shape, device=model.device)
            values.setdefault(f"lora.{target}.{side}", empty)
        part = b[projection.start : projection.start + projection.outputs] * (scale / common)
        row = numbers.index(number)
        values[f"lora.{target}.A"][row, : len(a)] = a
        values[f"lora.{target}.B"][row, :, : len(a)] = part
    targets = tuple(dict.fromkeys(target for _, target, *_ in places))
    chosen = None if len(numbers) == len(every) else tuple(numbers)
    return (LoRA(targets, rank, common * rank, layers=chosen),), values
