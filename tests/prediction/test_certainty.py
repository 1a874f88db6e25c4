"""Predictions that leave components out which cannot, or will hardly, change the class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import together
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.forecast import ClassForecast
from bhpeft_pyro.guides import DeltaGuide, LaplaceGuide, MixtureGuide, NormalGuide
from bhpeft_pyro.model.likelihoods import MultiLabel, MultipleChoice, Normal
from bhpeft_pyro.peft import LoRA
from bhpeft_pyro.prediction import predict as module
from bhpeft_pyro.testing import tiny_examples, tiny_model

ROWS, K, SHARE = 24, 4, 3  # components, and draws of each
TEXTS = [f"w{5 + i % 2} w{10 + i}" + " w9" * (i % 5) for i in range(ROWS)]
CHOICES = [[f"w{20 + i % 20}", "w6", "w7 w8", "w9"][: 2 + i % 3] for i in range(ROWS)]
DATA: dict[str, dict[str, Any]] = {
    "class": {"text": TEXTS, "label": [i % 2 for i in range(ROWS)]},
    "choice": {"question": TEXTS, "choices": CHOICES, "answer": [i % 2 for i in range(ROWS)]},
}
SHARED, APART = 1.0, 0.3
NUMBERS = ("probabilities", "total", "aleatoric", "epistemic", "variance")


def mixture(kind: str, guide: str, kinds: Any = None) -> bh.Posterior:
    """Components that agree on most texts, but not on all; nothing is trained."""
    likelihood = MultipleChoice() if kind == "choice" else None
    model = tiny_model(kinds, 1 if kind == "choice" else 2, likelihood=likelihood)
    classes = {"laplace": LaplaceGuide, "normal": NormalGuide, "delta": DeltaGuide}
    guides: list[Any] = [classes[guide](model) for _ in range(K)]
    torch.manual_seed(3)
    shared = {name: torch.randn_like(value) for name, value in guides[0].named_parameters()}
    for each in guides:
        for name, value in each.named_parameters():
            if name.startswith("loc") and "bias" not in name:
                value.data += SHARED * shared[name] + APART * torch.randn_like(value)
        if kind == "class":  # so that no class is preferred by all texts
            examples = model.encode_texts(DATA[kind], bh.Columns())
            point: Any = module.predict(model, each, examples, 0)
            each.move({"head.bias": each.means()["head.bias"] - point.log_probabilities.mean(0)})
        if guide == "laplace":
            each.set_covariance(Covariance(0.2 * each.scale, each.axes, each.ratio))
    return bh.Posterior(model, MixtureGuide(guides), ())


def predicted(posterior: Any, data: Any, **options: Any) -> ClassForecast:
    forecast = posterior.predict(data, SHARE * K, seed=2, **options)
    assert isinstance(forecast, ClassForecast)
    return forecast


def assert_rows(one: ClassForecast, at: Tensor, other: ClassForecast, of: Tensor) -> None:
    for name in NUMBERS:
        first, second = getattr(one, name)[at], getattr(other, name)[of]
        if first.dim() == 2:  # alone, a question has its own choices
            first = first[:, : second.shape[1]]
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("certainty", [1.0, 0.5, 0.2])
def test_stages_are_those_of_a_loop_over_texts(certainty: float) -> None:
    count, rows, classes = 5, 60, 3
    logits = torch.randn(rows, classes) + torch.randn(count, 1, rows, classes)
    draws = (3 * logits + torch.randn(count, 2, rows, classes)).softmax(-1)
    asked: list[int] = []

    def run(number: int, only: Tensor) -> tuple[Tensor]:
        asked.append(len(only))
        return (draws[number][:, only],)

    runs = [lambda only, n=n: run(n, only) for n in range(count)]
    found = module._until_certain(runs, tiny_examples(rows), certainty)
    full = draws.mean((0, 1)).argmax(-1)
    for row in range(rows):
        for used in range(1, count + 1):
            sums = draws[:used, :, row].mean(1).sum(0).sort(descending=True).values
            if sums[0] - sums[1] > certainty * (count - used):
                break
        own = draws[:used, :, row : row + 1]
        expected = ClassForecast.from_draws(own.flatten(0, 1))
        assert found.components is not None and found.components[row] == used
        assert_rows(found, torch.tensor([row]), expected, torch.tensor([0]))
        within = torch.stack([ClassForecast.from_draws(each).epistemic for each in own]).mean()
        assert found.between is not None
        assert abs(found.epistemic[row] - found.between[row] - within) < 1e-5
        assert certainty < 1 or found.label[row] == full[row]
    assert found.components is not None and len(found.components.unique()) >= 3
    assert sum(asked) == found.components.sum() and found.draws == 2 * count


@pytest.mark.parametrize(
    ("kind", "guide"),
    [("class", "laplace"), ("class", "normal"), ("choice", "laplace"), ("choice", "delta")],
)
def test_each_text_has_the_mixture_of_the_first_components(kind: str, guide: str) -> None:
    posterior, data = mixture(kind, guide), DATA[kind]
    full = predicted(posterior, data)
    sure, fast = (predicted(posterior, data, certainty=each) for each in (1, 0.3))
    assert torch.equal(sure.label, full.label) and sure.draws == full.draws
    assert sure.texts == full.texts and torch.equal(sure.observed(), full.observed())
    assert fast.components is not None and len(fast.components.unique()) > 1
    for used in fast.components.unique().tolist():
        guides = MixtureGuide(posterior.guide.components[:used])
        examples = posterior.encode(data)
        first: Any = module.predict(posterior.model, guides, examples, SHARE * used, seed=2)
        at = (fast.components == used).nonzero().flatten()
        assert_rows(fast, at, first, at)


@pytest.mark.parametrize("kind", ["class", "choice"])
def test_a_forecast_does_not_depend_on_the_other_texts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior, data = mixture(kind, "delta"), DATA[kind]
    whole = predicted(posterior, data, certainty=0.5)
    assert whole.components is not None and len(whole.components.unique()) > 1
    for row in (0, 13):
        alone = predicted(posterior, {k: v[row : row + 1] for k, v in data.items()}, certainty=0.5)
        assert alone.components == whole.components[row] and alone.draws == whole.draws
        assert_rows(whole, torch.tensor([row]), alone, torch.tensor([0]))
    monkeypatch.setattr(module, "PART", 2)  # some parts end before the last component
    parts = predicted(posterior, data, certainty=0.5)
    assert torch.equal(parts.components, whole.components)  # type: ignore[arg-type]
    assert_rows(parts, torch.arange(ROWS), whole, torch.arange(ROWS))


@pytest.mark.parametrize("upper", [True, False])
def test_only_the_texts_that_are_left_are_predicted(
    upper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = mixture("class", "delta", (LoRA(rank=2, layers=(-1,)),) if upper else ())
    lower: list[int] = []  # of a transformer whose states, or features, are constant
    block = posterior.model.network.attachment._layers[0].attention
    block.register_forward_hook(lambda _, inputs, __: lower.append(len(inputs[0])))
    ran: list[int] = []
    original = bh.RandomPEFT.forward

    def forward(network: bh.RandomPEFT, weights: dict[str, Tensor], batch: bh.data.Batch) -> Tensor:
        ran.append(len(batch))
        return original(network, weights, batch)

    monkeypatch.setattr(bh.RandomPEFT, "forward", forward)
    found = predicted(posterior, DATA["class"], certainty=0.5)
    assert found.components is not None and ROWS < found.components.sum() < ROWS * K
    assert sum(ran) == found.components.sum() and sum(lower) == ROWS


def test_two_processes_decide_as_one_does() -> None:
    posterior = mixture("class", "laplace")
    one = predicted(posterior, DATA["class"], certainty=0.5)
    work = lambda: predicted(posterior, DATA["class"], certainty=0.5)  # noqa: E731
    for other in together(work):
        assert torch.equal(other.components, one.components)
        assert_rows(other, torch.arange(ROWS), one, torch.arange(ROWS))


def test_arguments() -> None:
    posterior = mixture("class", "delta")
    for wrong in (0, 1.1, -1.0, True, "much"):
        with pytest.raises(
            ConfigError, match=r"certainty=.* a finite number above 0 and at most 1"
        ):
            predicted(posterior, TEXTS, certainty=wrong)
    with pytest.raises(
        ConfigError, match=r"certainty=0.5 leaves components out, which keep_samples"
    ):
        predicted(posterior, TEXTS, certainty=0.5, keep_samples=True)
    for likelihood in (Normal(), MultiLabel()):
        model = tiny_model((), 2 if isinstance(likelihood, MultiLabel) else 1, None, likelihood)
        guide = MixtureGuide([DeltaGuide(model), DeltaGuide(model)])
        with pytest.raises(ConfigError, match=f"which kind '{likelihood.kind}' does not allow"):
            bh.Posterior(model, guide, ()).predict(TEXTS, certainty=1)
    single = bh.Posterior(posterior.model, posterior.guide.components[0], ())
    assert single.predict(TEXTS, certainty=0.1).components is None  # there is nothing to leave out
