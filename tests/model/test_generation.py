"""The backbone itself under bound weights: `generate` against peft, and with against without a
cache; the tokens it made, scored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.peft import LoRA, Prefix
from bhpeft_pyro.testing import tiny_examples, tiny_tokenizer

NEW = 6
KINDS = bh.presets.bh_peft()
PEFT = {"query": "q_proj", "value": "v_proj", "ffn_out": "down_proj"}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
}


def language_model(model_type: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny.build(model_type, auto=AutoModelForCausalLM, eos_token_id=None, **options)


def prompts(rows: int = 4) -> dict[str, Tensor]:
    """Padded on the left, as `generate` wants them."""
    inputs = {name: value.flip(1) for name, value in tiny.inputs(rows, length=7).items()}
    return inputs | {"input_ids": inputs["input_ids"] * inputs["attention_mask"]}


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The new tokens (R, NEW) and the logits that they were chosen by (R, NEW, V)."""
    torch.manual_seed(3)
    out = model.generate(
        **inputs,
        **options,
        max_new_tokens=NEW,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def without_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same greedily, each token by a pass over the whole text."""
    ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], []
    for _ in range(NEW):
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        logits.append(out.logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, -NEW:], torch.stack(logits, 1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def network_on(model: PreTrainedModel, kinds: Any = KINDS) -> bh.RandomPEFT:
    return bh.RandomPEFT(model, kinds, bh.Head(2), tiny_tokenizer())


def adapted(model: PreTrainedModel, network: bh.RandomPEFT, weights: dict[str, Tensor]) -> Any:
    """A `PeftModel` with these weights of LoRA."""
    own = network.coordinates({name: value[None] for name, value in weights.items()})
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=[*PEFT.values()])
    theirs = peft.get_peft_model(model, config)
    for target, path in PEFT.items():
        modules = [m for name, m in theirs.named_modules() if name.endswith(f".{path}")]
        for layer, module in enumerate(modules):
            module.lora_A["default"].weight.data = own[f"lora.{target}.A"][0, layer]
            module.lora_B["default"].weight.data = own[f"lora.{target}.B"][0, layer]
    return theirs.eval()


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_generate_as_peft_does(model_type: str) -> None:
    network = network_on(language_model(model_type), LoRA(tuple(PEFT), rank=3, alpha=5.0))
    weights = tiny.drawn(network.sites, seed=2, scale=0.3)
    theirs = adapted(language_model(model_type), network, weights)
    plain, inputs = generated(network.backbone, prompts())[1], prompts()
    for way in WAYS.values():
        expected = generated(theirs, inputs, **way)
        with network.bind(weights) as model:
            tokens, logits = generated(model, inputs, **way)
        assert torch.equal(tokens, expected[0])
        close(logits, expected[1])
    assert not torch.allclose(logits[:4], plain, atol=0.1)
    assert torch.equal(generated(network.backbone, inputs)[1], plain), "something remained"


@pytest.mark.parametrize("model_type", tiny.CAUSAL)
def test_a_cache_changes_nothing(model_type: str) -> None:
    """LoRA, adapter and prefix; texts grow beyond the sliding windows."""
    network = network_on(language_model(model_type))
    weights, inputs = tiny.drawn(network.sites, 1, seed=2), prompts()
    with network.bind(weights) as model:
        tokens, logits = without_cache(model, inputs)
        close(generated(model, inputs)[1], logits, 1e-4)
        assert torch.equal(generated(model, inputs)[0], tokens)


@pytest.mark.parametrize("options", [{"attn_implementation": "eager"}, {}], ids=["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prefix_in_every_attention_and_cache(options: dict[str, str], cache: str) -> None:
    network = network_on(language_model(**options), Prefix(3))
    weights = tiny.drawn(network.sites, 1, seed=2)
    for inputs in (prompts(), prompts(2)):  # the second without padding
        with network.bind(weights) as model:
            found = generated(model, inputs, cache_implementation=cache)[1]
            close(found, without_cache(model, inputs)[1], 1e-4)
        assert not torch.allclose(found, without_cache(network.backbone, inputs)[1], atol=0.1)


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_draws_together_are_draws_alone(way: str) -> None:
    network = network_on(language_model())
    draws, inputs = tiny.drawn(network.sites, 3, seed=2, scale=0.5), prompts(2)
    with network.bind(draws) as model:
        tokens, _ = generated(model, {k: v.repeat(3, 1) for k, v in inputs.items()}, **WAYS[way])
    alone = []
    for number in range(3):
        with network.bind({name: value[number] for name, value in draws.items()}) as model:
            alone.append(generated(model, inputs, **WAYS[way])[0])
    assert torch.equal(tokens, torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])


def test_gates_are_refused() -> None:
    network = network_on(language_model(), bh.presets.unipelt())
    with (
        pytest.raises(ConfigError, match=r"bind: gates average .* expected gated=False"),
        network.bind(tiny.drawn(network.sites, 1, seed=2)),
    ):
        pass


# ------------------------------------------------------------------------- of a posterior


@pytest.fixture(scope="module")
def mixture() -> bh.Posterior:
    """Its labels are of a task; what it says about text is noise, and different in each part."""
    network = network_on(language_model(), bh.presets.lora(rank=2))
    options = {"epochs": 4, "lr": 0.05, "progress": False}
    return bh.fit(bh.Model(network), "laplace", tiny_examples(24), components=2, **options)


def test_components_in_threads_of_their_own(mixture: bh.Posterior) -> None:
    inputs, backbone = prompts(), mixture.model.network.backbone
    expected = []
    for part in mixture.components:
        with backbone_under(mixture, part.guide.means()) as model:
            expected.append(generated(model, inputs)[1])
    plain = generated(backbone, inputs)[1]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with mixture.bind(number) as model:
            found[number] = generated(model, inputs)[1]

    with mixture.bind(0) as model:
        for number in (0, 1):
            thread = threading.Thread(target=work, args=(number,))
            thread.start()
            thread.join()
            close(found[number], expected[number])
        other = threading.Thread(target=lambda: found.update({2: generated(model, inputs)[1]}))
        other.start()
        other.join()
        assert torch.equal(found[2], plain), "a thread saw the weights of another"
    assert not torch.allclose(expected[0], expected[1], atol=0.01)
    with pytest.raises(KeyError), mixture.bind(1):
        raise KeyError
    assert torch.equal(generated(backbone, inputs)[1], plain), "something remained"


@contextmanager
def backbone_under(posterior: bh.Posterior, means: dict[str, Tensor]) -> Iterator[PreTrainedModel]:
    network = posterior.model.network
    weights = network.coordinates({s.name: means[s.name][None] for s in network.sites})
    with network.attachment.bind(weights, None):
        yield network.backbone


def test_weights_of_a_component_or_a_draw(mixture: bh.Posterior) -> None:
    for number, part in enumerate(mixture.components):
        for name, value in mixture.weights(number).items():
            assert torch.equal(value, part.guide.means()[name])
    assert mixture.weights(np.int64(1)).keys() == mixture.weights(1).keys()  # type: ignore[arg-type]
    for wrong in (None, 2, -1, 0.5, True):
        with pytest.raises(ConfigError, match=f"component={wrong} must be an integer"):
            mixture.bind(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="draw=7: this posterior is of the network linearised"):
        mixture.bind(1, draw=7)
    network = network_on(language_model(), bh.presets.lora(rank=2))
    normal = bh.fit(bh.Model(network), "normal", tiny_examples(8), max_steps=2, progress=False)
    draws = [normal.weights(draw=number) for number in (7, 8, 7)]
    for name, value in normal.sample(1, seed=7).items():
        assert torch.equal(draws[0][name], value[0])
        assert torch.equal(draws[0][name], draws[2][name])
        assert not torch.equal(draws[0][name], draws[1][name])
