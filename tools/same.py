"""Whether a change of the code changes predictions: `python -m tools.same record FILE`, on the code
before it, then `python -m tools.same compare FILE`.

Both need the same machine and the same number of threads, since the comparison is bit for bit.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

QUICK: dict[str, Any] = {"max_steps": 8, "progress": False}
TEXTS = ["w5 w20 w9", "w6 w30", "w7", "w8 w41 w5 w6"]
LABELS = {"text": [f"w{5 + i % 2} w{10 + i}" for i in range(24)], "label": ["a", "b"] * 12}
MORE = {"text": [f"w{5 + i % 3} w{20 + i}" for i in range(18)], "label": ["a", "b", "c"] * 6}
RATINGS: dict[str, Any] = {
    "text": [f"w{5 + i % 4} w{10 + i % 30}" for i in range(60)],
    "label": [(i % 4) / 2 + (i % 7) / 10 for i in range(60)],
}
WORDS: dict[str, Any] = {
    "tokens": [["w5", "w20 w21", "w6"], ["w30"], ["w7", "w8"]] * 5,
    "tags": [[0, 1, 2], [1], [2, 0]] * 5,
}
CHOICES: dict[str, Any] = {
    "question": [f"w{5 + i % 3}" for i in range(12)],
    "choices": [["w9 w10", "w11", "w12 w13"], ["w20", "w21"]] * 6,
    "answer": [i % 2 for i in range(12)],
}
SEVERAL = {"text": LABELS["text"], "label": [["a"], ["b", "a"], [], ["b"]] * 6}


def model(likelihood: Any = None, outputs: int = 2, **head: Any) -> bh.Model:
    network = bh.RandomPEFT(
        tiny_backbone(), bh.presets.bh_peft(), bh.Head(outputs, **head), tiny_tokenizer()
    )
    return bh.Model(network, None, likelihood)


def forecast(posterior: bh.Posterior, texts: Any = TEXTS) -> dict[str, Tensor]:
    """All tensors of a forecast."""
    how: Any = {"keep_samples": True}
    if posterior.guide.linear:
        how = {"method": "exact"}
    values = vars(posterior.predict(texts, **how))
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def reloaded(posterior: bh.Posterior) -> bh.Posterior:
    with tempfile.TemporaryDirectory() as folder:
        posterior.save(Path(folder) / "saved")
        return bh.Posterior.load(
            Path(folder) / "saved", backbone=tiny_backbone(), tokenizer=tiny_tokenizer()
        )


def family(guide: Any) -> Iterator[bh.Posterior]:
    """Two rounds of a family, the second one saved and loaded."""
    start = model()
    first = bh.fit(start, guide, LABELS, components=1, **QUICK)
    yield first
    second = first.update({"text": TEXTS, "label": ["a", "b", "a", "b"]})
    yield second
    yield reloaded(second)


def point() -> Iterator[bh.Posterior]:
    """A point estimate, and a width around it."""
    first = bh.fit(model(), "delta", tiny_examples(60), **QUICK)
    yield first
    yield first.widen(tiny_examples(60))


def ratings(likelihood: Any, outputs: int = 1) -> Iterator[bh.Posterior]:
    start = model(likelihood, outputs)
    first = bh.fit(start, "laplace", RATINGS, components=2, **QUICK)
    yield first
    yield first.update({name: column[:9] for name, column in RATINGS.items()}, tau=0.5)


def mixture() -> Iterator[bh.Posterior]:
    """Three components with held-out rows, a second round with validation, forgetting."""
    start = model()
    first = bh.fit(start, "laplace", tiny_examples(64), components=3, **QUICK)
    yield first
    second = first.update(tiny_examples(20, 1), validation=tiny_examples(16, 2), keep=0.9)
    yield second
    yield reloaded(second)


def growth(guide: Any) -> Iterator[bh.Posterior]:
    first = bh.fit(model(), guide, LABELS, components=2, **QUICK)
    yield first.update(MORE, grow=True)


def own_prior() -> Iterator[bh.Posterior]:
    yield bh.fit(
        tiny_model(prior=bh.priors.Horseshoe()), "normal", tiny_examples(24), **QUICK, particles=2
    )


def changed_family() -> Iterator[bh.Posterior]:
    first = bh.fit(tiny_model(), "normal", tiny_examples(24), **QUICK)
    yield first.update(tiny_examples(12, 1), guide="laplace")


def words() -> Iterator[bh.Posterior]:
    start = model(None, 3, each_word=True)
    columns = bh.Columns(text="tokens", label="tags")
    yield bh.fit(start, "laplace", WORDS, columns=columns, components=2, **QUICK)


def choices() -> Iterator[bh.Posterior]:
    start = model(bh.likelihoods.MultipleChoice(), 1)
    yield bh.fit(start, "laplace", CHOICES, components=2, **QUICK)


def several() -> Iterator[bh.Posterior]:
    yield bh.fit(model(bh.likelihoods.MultiLabel()), "laplace", SEVERAL, components=2, **QUICK)


FITS: dict[str, Callable[[], Iterator[bh.Posterior]]] = {
    "laplace": lambda: family("laplace"),
    "normal": lambda: family("normal"),
    "lowrank": lambda: family("lowrank"),
    "blocks": lambda: family({"*.A": ("delta", {"width": 0.1}), "*": "normal"}),
    "delta and widen": point,
    "ratings": lambda: ratings(bh.likelihoods.Normal()),
    "ratings, noise by text": lambda: ratings(bh.likelihoods.HeteroscedasticNormal(), 2),
    "ratings, heavy tails": lambda: ratings(bh.likelihoods.StudentT()),
    "mixture in rounds": mixture,
    "growth, laplace": lambda: growth("laplace"),
    "growth, normal": lambda: growth("normal"),
    "horseshoe": own_prior,
    "another family": changed_family,
    "words": words,
    "choices": choices,
    "several labels": several,
}


def recorded(name: str) -> dict[str, Tensor]:
    """All tensors of the forecasts of one fit and its rounds."""
    found: dict[str, Tensor] = {}
    for number, posterior in enumerate(FITS[name]()):
        texts: Any = TEXTS
        if name == "words":
            texts = {"tokens": WORDS["tokens"][:4]}
        if name == "choices":
            texts = {key: CHOICES[key][:4] for key in ("question", "choices")}
        for key, value in forecast(posterior, texts).items():
            found[f"{name}/{number}/{key}"] = value.contiguous()
    return found


def main() -> None:
    what, path, *names = sys.argv[1:]
    old = {} if what == "record" else load_file(path)
    new: dict[str, Tensor] = {}
    differ = 0
    for name in names or FITS:
        found = recorded(name)
        new |= found
        if what == "compare":
            before = {key: value for key, value in old.items() if key.startswith(f"{name}/")}
            there = before.keys() <= found.keys()  # forecasts may say more than they did
            same = there and all(torch.equal(value, found[key]) for key, value in before.items())
            differ += not same
            print(f"{name}: {'the same' if same else 'DIFFERENT'}, {len(found)} tensors")
            if not same:
                print("  ", set(before.keys() - found.keys()) or "values")
        else:
            print(f"{name}: {len(found)} tensors")
    if what == "record":
        save_file(new, path)
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
