"""The engine: what is answered together, refused, dropped, and exchanged."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from services import LIMITS, held, probabilities, right, started
from students import fitted

from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.serving.engine import Engine, Refused
from bhpeft_pyro.serving.rounds import Served
from bhpeft_pyro.testing import tiny_examples

TEXTS = tiny_examples(40, seed=9).texts


def asked(engine: Engine, *texts: Any) -> Future:
    return engine.ask({"text": [*texts]})


def test_answers_are_those_of_the_posterior_whatever_is_predicted_together(engine) -> None:
    parts = [TEXTS[:1], TEXTS[1:8], TEXTS[8:9], TEXTS[9:25]]
    futures = [asked(engine, *part) for part in parts]
    with started(engine):
        for part, future in zip(parts, futures, strict=True):
            assert right(future.result(20), part)
        said = futures[1].result()[0][0]
    assert said["answered"] in (True, False) and 0 < said["novelty"] <= 1
    assert {"prediction", "probability", "epistemic", "aleatoric", "reason"} <= said.keys()


def test_all_that_waits_is_one_batch(april) -> None:
    batches: list[tuple[int, int]] = []  # texts and tokens
    engine = Engine(april, LIMITS, lambda *batch: batches.append(batch[:2]))
    futures = [asked(engine, *[" ".join(["w5"] * (1 + i % 6))] * 16) for i in range(20)]
    with started(engine):
        assert all(len(future.result(20)[0]) == 16 for future in futures)
    assert batches == [(256, 256 * 6), (64, 64 * 6)]  # padded to the longest


def test_what_is_too_large_is_refused_alone(engine) -> None:
    long = " ".join(["w5"] * 30)
    futures = [asked(engine, "w5"), asked(engine, *[long] * 10), asked(engine, "w6")]
    with pytest.raises(Refused, match="17 texts; expected 16") as refused:
        asked(engine, *["w5"] * 17)
    assert refused.value.status == 413
    whole = engine.ask({"text": [" ".join(["w5"] * 33)]}, truncate=False)
    cut = engine.ask({"text": ["w5", "w6"]}, truncate=False)
    with started(engine):
        assert len(futures[0].result(20)[0]) == len(futures[2].result(20)[0]) == 1
        with pytest.raises(Refused, match="300 tokens with padding; expected 256") as refused:
            futures[1].result(20)
        assert refused.value.status == 413
        with pytest.raises(Refused, match="33 tokens; expected 32") as refused:
            whole.result(20)
        assert refused.value.status == 413 and len(cut.result(20)[0]) == 2


def test_a_request_is_judged_by_its_own_choices(tmp_path) -> None:
    """One of another client with many choices neither refuses it nor counts for it."""
    batches: list[tuple[int, int]] = []  # texts and tokens
    served = Served(fitted("choice"), tmp_path)
    engine = Engine(served, replace(LIMITS, tokens=60), lambda *batch: batches.append(batch[:2]))
    few = {"question": ["w5 w6"] * 4, "choices": [["w7", "w8"]] * 4}  # tokens: 4 x 3 x 2 = 24
    many = {"question": ["w5 w6"] * 2, "choices": [["w7"] * 8] * 2}  # 2 x 3 x 8 = 48
    too_many = {"question": ["w5 w6"] * 3, "choices": [["w7"] * 8] * 3}
    first, second, third, fourth = map(engine.ask, (few, many, too_many, few))
    with started(engine):
        assert [len(one.result(20)[0]) for one in (first, second, fourth)] == [4, 2, 4]
        with pytest.raises(Refused, match="72 tokens with padding; expected 60 at most"):
            third.result(20)
    assert sum(texts for texts, _ in batches) == 10


def test_a_request_that_was_refused_is_not_looked_at_again(engine, monkeypatch) -> None:
    longest = Served.longest

    def breaks(self: Served, table: Any) -> int:
        if table["text"] == ["w8"]:
            raise ZeroDivisionError("secret")
        return longest(self, table)

    monkeypatch.setattr(Served, "longest", breaks)
    texts = (" ".join(["w5"] * 33), "w8", "w6")
    long, odd, right = (engine.ask({"text": [text]}, truncate=False) for text in texts)
    with started(engine):
        assert len(right.result(20)[0]) == 1
        for future, status in ((long, 413), (odd, 424)):
            with pytest.raises(Refused) as refused:
                future.result(20)
            assert refused.value.status == status


def test_of_requests_that_are_predicted_together_only_the_one_at_fault_fails(
    engine, monkeypatch
) -> None:
    answer = Served.answer

    def breaks(self: Served, examples: Any) -> Any:
        if "w7 w7" in examples.texts:
            raise ZeroDivisionError("secret")
        return answer(self, examples)

    monkeypatch.setattr(Served, "answer", breaks)
    futures = [asked(engine, text) for text in ("w5", None, "w6", "w7 w7", "w8")]
    with started(engine):
        for i in (0, 2, 4):
            assert len(futures[i].result(20)[0]) == 1
        for i, status, why in ((1, 422, "the text is missing"), (3, 424, "the prediction failed")):
            with pytest.raises(Refused, match=why) as refused:
                futures[i].result(20)
            assert refused.value.status == status and "secret" not in str(refused.value)


def test_a_bug_does_not_end_the_thread(running, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_predict", lambda *_: 1 / 0)
        with pytest.raises(Refused, match="the server's log") as refused:
            asked(running, "w5").result(20)
        assert refused.value.status == 424
    assert running.alive and asked(running, "w5").result(20)[0]


def test_what_is_cancelled_before_its_batch_is_not_predicted(april) -> None:
    batches: list[tuple[int, int]] = []  # texts and tokens
    with (
        held() as predictions,
        started(Engine(april, LIMITS, lambda *batch: batches.append(batch[:2]))) as engine,
    ):
        first = asked(engine, "w5")
        assert predictions.begun.wait(20)
        others = [asked(engine, "w6", "w7") for _ in range(3)]
        assert engine._queue.qsize() == 3 and others[1].cancel()
        predictions.go.set()
        assert others[0].result(20) and others[2].result(20) and first.result(20)
    assert sum(texts for texts, _ in batches) == 1 + 4


def test_a_request_that_has_begun_ends_on_the_old_round(april, may) -> None:
    with held() as predictions, started(Engine(april, LIMITS)) as engine:
        first = asked(engine, *TEXTS[:3])
        assert predictions.begun.wait(20)
        engine.exchange(may)
        second = asked(engine, *TEXTS[:3])
        predictions.go.set()
        assert first.result(20)[1] is april and second.result(20)[1] is may
        assert right(first.result(), TEXTS[:3]) and right(second.result(), TEXTS[:3])
        engine.roll_back()
        assert asked(engine, "w5").result(20)[1] is april
        engine.roll_back()
        assert asked(engine, "w5").result(20)[1] is may
        engine.exchange(replace(may))  # once more, as it may have got a promise
        engine.roll_back()
        assert asked(engine, "w5").result(20)[1] is april
    assert probabilities(april, TEXTS[:3]) != pytest.approx(probabilities(may, TEXTS[:3]), abs=1e-3)
    with pytest.raises(Refused, match="no round before"):
        Engine(april, LIMITS).roll_back()


def test_exchanges_under_load_lose_and_mix_nothing(source, april, may) -> None:
    """Rounds are loaded, on the backbone that answers meanwhile, while clients ask."""
    answers, done = [], threading.Event()
    expected = {served.id: probabilities(served, TEXTS) for served in (april, may)}

    def client(start: int) -> None:
        while not done.is_set():
            at = [(start + k) % len(TEXTS) for k in range(1 + start % 3)]
            answered = asked(engine, *(TEXTS[i] for i in at)).result(20)
            answers.append((at, answered))

    with started(Engine(april, LIMITS)) as engine:
        clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for thread in clients:
            thread.start()
        for i in range(20):
            engine.exchange(source.load("may" if i % 2 == 0 else "april", beside=engine.served))
            answers.append(([0], asked(engine, TEXTS[0]).result(20)))
        done.set()
        for thread in clients:
            thread.join(20)
    assert len({answered[1].id for _, answered in answers}) == 2
    for at, answered in answers:
        got = [row["scores"]["good"] for row in answered[0]]
        of_round = expected[answered[1].id]
        assert got == pytest.approx([of_round[i] for i in at], abs=1e-5)


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"texts": -1}, {"seconds": float("nan")}])
def test_limits_that_cannot_work(wrong) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        replace(LIMITS, **wrong)


def test_what_waits_at_the_end_is_answered(april) -> None:
    with held() as predictions:
        engine = Engine(april, LIMITS)
        assert not engine.alive
        engine.start()
        futures = [asked(engine, "w5"), asked(engine, "w6")]
        closing = threading.Thread(target=engine.close)
        closing.start()
        predictions.go.set()
        closing.join(20)
    assert all(future.done() for future in futures) and not engine.alive
    engine.close()
    with started(engine):
        assert asked(engine, "w5").result(20)[0]
