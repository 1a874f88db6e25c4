"""Services in this process, and what clients send to them."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.serving.engine import Answered, Engine, Limits
from bhpeft_pyro.serving.rounds import Served

PATHS = ("/predict", "/invocations", "/v2/models/runs/infer", "/feedback")
LIMITS = Limits(requests=8, texts=16, tokens=256, bytes=20_000, seconds=20.0)


def network_in(folder: Path, kinds: Sequence[Any], outputs: int) -> RandomPEFT:
    """A network on the backbone `tiny` of a folder, which names it."""
    backbone, tokenizer = load_backbone(str(folder / "tiny"), "cpu")
    return RandomPEFT(backbone, kinds, Head(outputs), tokenizer)


@contextmanager
def started(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def listening(app: Any, **how: Any) -> Iterator[str]:
    """The address of a server of the application, in a thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, **{"log_level": "error"} | how))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Held:
    """Predictions that wait: whether one has `begun`, and that they may `go`."""

    begun: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


@contextmanager
def held() -> Iterator[Held]:
    """Within the block predictions wait until they may go; at its end they may."""
    made, answer = Held(), Served.answer

    def wait(self: Served, examples: Any) -> Any:
        made.begun.set()
        made.go.wait()
        return answer(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Served, "answer", wait)
        try:
            yield made
        finally:
            made.go.set()


def until(holds: Any, seconds: float = 20.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.005)


def probabilities(served: Served, texts: Sequence[str]) -> list[float]:
    """Of the class "good", by the posterior itself."""
    return served.posterior.predict([*texts]).probabilities[:, 1].tolist()


def right(answered: Answered, texts: Sequence[str]) -> bool:
    """Whether the answers are those of the round that they name."""
    rows, served = answered
    got = [row["scores"]["good"] for row in rows]
    return got == pytest.approx(probabilities(served, texts), abs=1e-5)


def malformed(random: random.Random) -> bytes:
    """A body that is broken in one of many ways."""
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w5"]}
    good = json.dumps({"inputs": random.choice([["w5 w6", "w7"], [tensor]])}).encode()
    leaf: Any = random.choice([None, True, 1e999, -1, "", "w5", "\ud800", [], {}, 10**30, "\0"])
    for _ in range(random.randrange(4)):
        leaf = random.choice(
            [[leaf], {"inputs": leaf}, [leaf, "w5"], {"text": leaf}, {**tensor, "data": leaf}]
        )
    match random.randrange(6):
        case 0:
            return good[: random.randrange(len(good))]
        case 1:
            return random.randbytes(random.randrange(200))
        case 2:
            at = random.randrange(len(good))
            return good[:at] + random.randbytes(2) + good[at:]
        case 3:
            return json.dumps({"inputs": leaf, "truncate": random.choice([leaf, True])}).encode()
        case 4:
            return b"[" * random.randrange(10_000)
        case _:
            return json.dumps(leaf).encode()
