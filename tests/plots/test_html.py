"""What notebooks show."""

from __future__ import annotations

import re
from base64 import b64decode
from html.parser import HTMLParser
from typing import Any

import pyro.distributions as dist
import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro import priors
from bhpeft_pyro.forecast import ClassForecast, RatingForecast
from bhpeft_pyro.testing import tiny_examples, tiny_model

EMPTY = {"img", "meta"}


class Parsed(HTMLParser):
    """Fails where tags do not match; keeps the text, the cells of the first rows, and pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data}|"


@pytest.fixture(scope="module")
def posterior() -> bh.Posterior:
    return bh.fit(tiny_model(()), "normal", tiny_examples(16), max_steps=3, progress=False)


def shown(value: Any) -> Parsed:
    found = Parsed(value._repr_html_())
    for source in found.images:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64" and b64decode(data).startswith(b"\x89PNG")
    return found


def test_a_site_is_a_line_and_sites_are_a_table() -> None:
    sites = tiny_model().sites
    assert [repr(site) for site in sites] == repr(sites).splitlines()
    assert re.fullmatch(
        r"<Site lora\.query\.B: layer 2 x out 16 x rank 2, role output, unit 0\.0\d+ to 0\.0\d+>",
        repr(sites[1]),
    )
    table = shown(sites)
    assert table.tags.count("tr") == 1 + len(sites)
    assert "lora.query.A|layer 2 x rank 2 x in 16|64|input|0.25|" in table.text


def test_a_model_a_report_and_a_posterior(posterior: bh.Posterior) -> None:
    model = shown(posterior.model)
    assert "random weights|34|" in model.text and "head.bias|output 2|2|head|1|" in model.text
    report = shown(posterior.report)
    assert str(posterior.report) in report.text and len(report.images) == 1
    assert "max_steps=3" in report.text
    whole = shown(posterior)
    assert str(posterior.report) in whole.text and "guide|MeanFieldGuide(normal)|" in whole.text
    assert "student" not in whole.text + repr(posterior)


def test_a_posterior_says_how_far_its_student_is(posterior: bh.Posterior) -> None:
    both = posterior.distill(tiny_examples(60, seed=1), epochs=1, progress=False)
    assert both.student is not None and str(both.report) == str(posterior.report)
    kl = f"{both.student.report.divergence:.4f}"
    line = f"1 pass a text for 1, KL {kl} nats on 12 held-out texts"
    assert repr(both.student) == f"Student({line})"
    assert repr(both.lineage) == f"(FitReport(round {both.report.id}, 3 steps on 16 examples),)"
    assert repr(both) == f"{posterior!r}\nstudent: {line}"
    assert f"student|{line}|" in shown(both).text
    assert len(shown(posterior.replace(lineage=())).images) == 0


def test_a_forecast_lists_the_least_certain_and_cuts_their_texts() -> None:
    p = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.9, 0.1], [0.6, 0.4]]])
    texts = ["sure", "y" * 200]
    names = ["no", "yes"]
    bare = ClassForecast.from_draws(p, texts=texts, label_names=names)
    assert len(shown(bare).images) == 1
    found = shown(bare.with_labels([0, 1]))
    assert len(found.images) == 3
    assert re.search(r"1\|yes\|no\|0\.55\|.*\|y{97}\.\.\.\|.*0\|no\|no\|0\.9\|", found.text, re.S)


def test_a_forecast_of_ratings() -> None:
    forecast = RatingForecast.from_draws(torch.randn(4, 30), torch.ones(4, 30))
    found = shown(forecast)
    assert found.tags.count("tr") == 11 and len(found.images) == 1
    assert len(shown(forecast.with_labels(torch.zeros(30))).images) == 2


def test_texts_and_names_cannot_break_it() -> None:
    p = torch.tensor([[[0.9, 0.1]]])
    forecast = ClassForecast.from_draws(p, texts=["<script>"], label_names=["<i>", "&"], labels=[1])
    assert not {"script", "i"} & {*shown(forecast).tags}

    def own(site: object) -> Any:
        return dist.Normal(0.0, 1.0)

    model = tiny_model((), prior={"*": own})  # its repr has "<function"
    model.network.backbone.config._name_or_path = "<b>"
    found = shown(model)
    assert "b" not in found.tags and "<b>" in found.text and "<function" in found.text


def test_priors_say_what_they_are(posterior: bh.Posterior) -> None:
    mixed = priors.as_prior({"head.*": priors.Hierarchical(), "*": dist.Normal(0.0, 1.0)})
    assert str(mixed).startswith("{'head.*': Hierarchical(change=None") and "'*': Normal(" in str(
        mixed
    )
    plain = posterior.as_prior()
    assert str(plain) == "an earlier posterior of 34 independent weights: head.weight, head.bias"
