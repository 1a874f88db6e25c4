"""What cannot work is refused by name, before anything is trained or overwritten."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import hierarchical
from pyro.infer.autoguide import AutoNormal

import bhpeft_pyro as bh
from bhpeft_pyro.errors import (
    BHPEFTError,
    ConfigError,
    DataError,
    GuideError,
    LikelihoodError,
)
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.model.likelihoods import Likelihood
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer
from bhpeft_pyro.training import loop

GOOD = {"text": ["w5 w9", "w6 w8", "w5", "w6"], "label": [0, 1, 0, 1]}


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a step of the optimiser is taken."""

    def step(*_args: Any) -> Any:
        pytest.fail("a step was taken")

    monkeypatch.setattr(loop._Run, "_step", step)


def refused(
    error: type[BHPEFTError],
    message: str,
    model: bh.Model | None = None,
    guide: Any = None,
    data: Any = None,
    **options: Any,
) -> None:
    """The fit is refused, and neither guide, model nor random state have moved."""
    model = tiny_model(()) if model is None else model
    own = guide is None
    guide = MeanFieldGuide(model) if own else guide
    before = {k: v.clone() for k, v in guide.state_dict().items()} if own else {}
    prior = model.prior
    options = {"progress": False, "max_steps": 5, **options}
    with pytest.raises(error, match=message):
        bh.fit(model, guide, GOOD if data is None else data, **options)
    assert model.prior is prior
    assert not list(pyro.get_param_store().keys())
    if own:
        after = guide.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


pytestmark = pytest.mark.usefixtures("untrained")


def with_(**columns: Any) -> dict[str, Any]:
    return {**GOOD, **columns}


def test_labels_are_checked_before_the_fit() -> None:
    message = "data: all 4 labels in column 'label' are '1'; .* two classes"
    refused(DataError, message, data=with_(label=[1, 1, 1, 1]))
    refused(DataError, "row 0: '7' is not one of", validation=with_(label=[7, 1, 0, 1]))
    refused(DataError, "there are no rows", validation=[])


def test_texts_that_are_too_long_are_cut_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = with_(text=["w5 w9 w9 w9 w9", "w6 w8", "w5", "w6"])
    with pytest.warns(UserWarning, match="1 of 4 texts are longer than 3 tokens"):
        posterior = bh.fit(
            tiny_model(()), "normal", data, columns=bh.Columns(max_length=3), max_steps=1
        )
    cut = posterior.encode(["w5 w9 w9"], labelled=False)
    assert int(cut.lengths.max()) == 3
    with pytest.warns(UserWarning, match="longer than 3"):
        one = posterior.predict(["w5 w9 w9 w30 w31"], samples=3).probabilities
    assert torch.equal(one, posterior.predict(["w5 w9 w9"], samples=3).probabilities)


def test_texts_that_the_backbone_cannot_read_are_cut_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer without a limit let them through to an error deep in the transformer."""
    monkeypatch.undo()
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    backbone = tiny_backbone()
    model = bh.Model(bh.RandomPEFT(backbone, (), bh.Head(2), tokenizer))
    most = backbone.config.max_position_embeddings
    long = {"text": ["w5 " * (most + 1), "w6 " * most] * 4, "label": [0, 1] * 4}
    with pytest.warns(bh.data.CutWarning, match=f"4 of 8 texts are longer than {most} tokens"):
        posterior = bh.fit(model, "normal", long, max_steps=2, progress=False)
    with pytest.warns(bh.data.CutWarning):
        posterior.predict(long["text"])
    with pytest.raises(DataError, match=f"max_length={most + 1}: .* positions for {most} tokens"):
        bh.fit(model, "normal", long, columns=bh.Columns(max_length=most + 1))
    encoded = bh.data.encode(long, tokenizer, kind="class")
    with pytest.raises(DataError, match=f"texts of {most + 1} tokens"):
        bh.fit(model, "normal", encoded)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 6, "particles": 4}, "batch_size=6 must be a multiple of 4"),
    ({"batch_size": 2, "particles": 4}, "batch_size=2 must be a multiple of 4"),
    ({"patience": 3}, "patience=3 needs validation data"),
    ({"lr": 0.0}, "lr="),
    ({"lr": float("nan")}, "lr="),
    ({"epochs": 0}, "epochs="),
    ({"max_steps": 0}, "max_steps="),
    ({"epochs": 2.5}, "epochs="),
    ({"particles": 0}, "particles="),
    ({"temperature": -1.0}, "temperature="),
    ({"tau": 1e-300}, "tau="),
    ({"tau": 1e6}, "tau="),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options(options: dict[str, Any], message: str) -> None:
    refused(ConfigError, message, **options)


def invents(batch: object) -> None:
    loc = pyro.param("loc", torch.zeros(()))
    for name in ("head.weight", "head.bias", "head.scale"):
        shape = {"head.weight": (2, 16), "head.bias": (2,)}.get(name, ())
        pyro.sample(name, dist.Normal(loc, 1.0).expand(shape).to_event(len(shape)))


@pytest.mark.parametrize(
    ("guide", "error", "message"),
    [
        (dict, GuideError, "unknown guide <class 'dict'>"),
        (MeanFieldGuide, GuideError, r"got the class MeanFieldGuide; pass MeanFieldGuide\(model\)"),
        (AutoNormal(tiny_model(())), ConfigError, "got an AutoNormal object.*pass AutoNormal, the"),
        (torch.nn.Identity(), GuideError, "'head.weight' of the model is not sampled"),
        (invents, GuideError, "the model lacks head.scale; .*is_auxiliary"),
    ],
)
def test_guides(guide: Any, error: type[BHPEFTError], message: str) -> None:
    with pytest.raises(error, match=message):
        bh.fit(tiny_model(()), guide, GOOD, progress=False)


@pytest.mark.parametrize("name", ["normal", "delta", "laplace"])
def test_guides_of_another_model(name: str) -> None:
    head, lora = tiny_model(()), tiny_model()
    with pytest.raises(GuideError, match=r"another model: it lacks lora.query.A, .*value.B; exp"):
        bh.fit(lora, bh.autoguide(name, head), GOOD, progress=False)
    with pytest.raises(GuideError, match=r"another model: the model lacks lora.query.A, .*value.B"):
        bh.fit(head, bh.autoguide(name, lora), GOOD, progress=False)
    wider = tiny_model(bh.presets.lora(rank=3))
    with pytest.raises(GuideError, match=r"another model: other shapes of lora.query.A, .*value.B"):
        bh.fit(wider, bh.autoguide(name, lora), GOOD, progress=False)


def test_functions_that_make_no_guide() -> None:
    with pytest.raises(GuideError, match=r"^guide: calling Head\(.* with None, .*missing"):
        bh.fit(tiny_model(()), bh.Head(2), GOOD, progress=False)  # type: ignore[arg-type]
    with pytest.raises(GuideError, match=r"^guide: calling .* with None, .*'size'"):
        bh.fit(tiny_model(()), lambda batch: batch.size, GOOD, progress=False)


def test_a_joint_guide_under_another_prior_is_called_by_its_name() -> None:
    use = "^autoguide: 'laplace': use 'normal' under this prior; reason: "
    with pytest.raises(GuideError, match=rf"{use}the prior also samples tau, on which"):
        bh.fit(tiny_model((), prior=hierarchical), "laplace", GOOD, progress=False)
    with pytest.raises(
        GuideError, match=rf"{use}'head.weight' is Laplace under the prior; expected Normal$"
    ):
        bh.fit(tiny_model((), prior=dist.Laplace(0.0, 1.0)), "laplace", GOOD, progress=False)
    with pytest.raises(GuideError, match=rf"{use}.* head.bias.log_scale"):
        bh.fit(tiny_model((), prior=bh.priors.Hierarchical()), "laplace", GOOD, progress=False)


class AnOutputTooMany(Likelihood):
    kind = "rating"
    outputs = 1

    def distribution(self, outputs: Any) -> Any:
        return dist.Normal(outputs.values, 1.0)


@pytest.mark.parametrize("name", ["normal", "laplace", "delta"])
@pytest.mark.parametrize("kinds", [(), None])
def test_likelihoods_with_another_batch_shape(name: str, kinds: Any) -> None:
    model = tiny_model(kinds, 1, likelihood=AnOutputTooMany())
    message = r"AnOutputTooMany: .*shape \((\d, )*1\), expected \(\*P, B\) = \(.*\[\.\.\., 0\]"
    with pytest.raises(LikelihoodError, match=message):
        bh.fit(model, name, with_(label=[0.5, 1.0, 2.0, 3.0]), progress=False)


def test_data_in_the_place_of_a_batch() -> None:
    with pytest.raises(DataError, match=r"expected a Batch, got dict; .*encode.*batches"):
        pyro.poutine.trace(tiny_model(())).get_trace(GOOD)


def test_a_backbone_without_a_tokenizer() -> None:
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(2))
    with pytest.raises(ConfigError, match="tokenizer="):
        bh.fit(bh.Model(network), "normal", GOOD, progress=False)


# What is not an error


def test_less_data_than_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round may bring a single example: every weight draw gets one, and N is right."""
    monkeypatch.undo()
    few = {"text": ["w5 w9", "w6 w8"], "label": [0, 1]}
    model = tiny_model(())
    guide = MeanFieldGuide(model, ("normal", {"init_scale": 1e-6}))
    posterior = bh.fit(
        model, guide, few, particles=8, batch_size=16, max_steps=2, lr=1e-9, progress=False
    )
    # With next to no width the expected NLL is that of the point: log 2 for a head of zeros.
    for entry in posterior.report.history:
        assert entry["nll"] == pytest.approx(0.6931, abs=1e-3)
        assert entry["loss"] == pytest.approx(entry["nll"] + entry["kl"], rel=1e-5)
    second = posterior.update({"text": ["w7"], "label": [1]})
    assert second.report.examples == 1
    assert second.report.history[0]["nll"] == pytest.approx(0.6931, abs=1e-2)


def test_errors_in_an_update_leave_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    first = bh.fit(tiny_model(()), "normal", tiny_examples(16), max_steps=3, progress=False)
    before = first.predict(GOOD, samples=4).probabilities
    cases: list[tuple[Any, dict[str, Any], type[BHPEFTError]]] = [
        ([], {}, DataError),
        (with_(label=[0, 1, 2, 1]), {}, DataError),
        (GOOD, {"particles": 3}, ConfigError),
        (GOOD, {"patience": 3}, ConfigError),
    ]
    for data, options, error in cases:
        with pytest.raises(error):
            first.update(data, **options)
    assert torch.equal(first.predict(GOOD, samples=4).probabilities, before)
    with pytest.raises(DataError, match="there are no rows"):
        first.predict([])
    with pytest.raises(DataError, match="row 1: the text is empty"):
        first.predict(["w5", ""])
    with pytest.raises(DataError, match="column 'label' is missing"):
        first.evaluate({"text": ["w5"]})
