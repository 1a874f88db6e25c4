"""A file of labels that comes from elsewhere, or is long, stops nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from program import bhpeft
from scipy.special import betaln
from services import LIMITS
from starlette.testclient import TestClient

from bhpeft_pyro.decisions import watching
from bhpeft_pyro.serving.feedback import FILE, Feedback, Seen, Tally, read
from bhpeft_pyro.serving.service import Service
from bhpeft_pyro.testing import tiny_examples

TEXTS = [*tiny_examples(60, seed=21).texts]
TRUE = ["bad", "good"] * 30
FALSE = ["good", "bad"] * 30


def take(served: Any, texts: Any, labels: Any) -> Seen:
    table = {"text": texts, "label": labels}
    return Feedback(16_384).take(served, read({"rows": table}, served))


def test_a_file_that_cannot_be_read_stops_nothing_else(copied, source) -> None:
    (copied.folder / FILE).mkdir()
    with TestClient(Service(source, copied, LIMITS).application) as client:
        refused = [
            client.get("/feedback"),
            client.post("/feedback", json={"text": "w5", "label": "bad"}),
        ]
        for response in refused:
            assert response.status_code == 503 and "the server's log" in response.json()["error"]
            assert str(copied.folder.parent) not in response.text
        text = client.get("/metrics").text
        assert 'bhpeft_feedback{what="labels"} 0.0' in text and "bhpeft_promise_holds NaN" in text
        assert client.post("/predict", json={"inputs": "w5"}).status_code == 200
    shown = bhpeft("history", copied.folder.parent, code=0)
    assert f"labels of {copied.id} are left out" in shown.stderr and "may" in shown.stdout


def test_all_labels_are_judged_at_once(copied, monkeypatch) -> None:
    """One by one, 40,000 took 14 seconds."""
    take(copied, TEXTS, FALSE)
    judged: list[Any] = []
    monkeypatch.setattr(watching, "betaln", lambda *counts: judged.append(0) or betaln(*counts))
    seen = Feedback(16_384).seen(copied)
    tally = Tally.of(copied.folder, copied.id)
    assert seen.tally.newest.answered > 20 and tally is not None and len(judged) == 2
    assert tally.newest.evidence == pytest.approx(seen.tally.newest.evidence)
