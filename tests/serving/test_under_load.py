"""A server of its own: killed, exchanged under load, and sent nonsense."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import pytest
import uvicorn
from forks import start, wait
from services import PATHS, malformed, probabilities, until

from bhpeft_pyro.base.log import Log
from bhpeft_pyro.serving.engine import Limits
from bhpeft_pyro.serving.feedback import FILE
from bhpeft_pyro.serving.rounds import Served, Source
from bhpeft_pyro.serving.service import Service
from bhpeft_pyro.testing import tiny_examples

pytestmark = pytest.mark.slow
TEXTS = [*tiny_examples(40, seed=9).texts]
ADMIN = {"authorization": "Bearer secret"}


def answers(client: httpx.Client) -> bool:
    """Whether somebody listens, and is ready."""
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def serving(runs: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`bhpeft serve` in a process of its own, once it is ready."""
    port = free_port()
    command = (sys.executable, "-m", "bhpeft_pyro", "serve", runs, "--round", "april")
    process = subprocess.Popen(
        [*map(str, command), "--port", str(port), "--device", "cpu"],
        env={**os.environ, "BHPEFT_ADMIN_TOKEN": "secret"},
        stderr=subprocess.DEVNULL,
    )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    try:
        until(lambda: answers(client), 120)
        yield process, client
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "runs", tmp_path / "runs"))


@contextmanager
def forked(service: Service) -> Iterator[tuple[int, httpx.Client]]:
    """A process of its own that serves."""
    opened = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        config = uvicorn.Config(service.application, log_level="critical")
        uvicorn.Server(config).run(sockets=[opened])

    child = start(serve)
    address = "http://{}:{}".format(*opened.getsockname())
    opened.close()  # so that nobody listens once the child is dead
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            until(lambda: answers(client), 60)
            yield child, client
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        wait(child)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_100_kills_lose_no_label(runs: Path, source: Source, april: Served) -> None:
    """What was said to be kept is in the file, whole, and counted by the next process. The kill
    comes at a random moment, while labels are sent as fast as they are taken."""
    served, log = replace(april, folder=runs / "april"), Log(runs / "april" / FILE)
    said, there, moments = 0, 0, random.Random(0)
    for _ in range(100):
        with forked(Service(source, served, Limits())) as (child, client):
            assert client.get("/feedback").json()["labels"] == there
            kill = threading.Timer(moments.uniform(0.01, 0.2), os.kill, (child, signal.SIGKILL))
            kill.start()
            with suppress(httpx.TransportError):
                while True:
                    row = {"text": TEXTS[said % 40], "label": "bad", "by": str(said)}
                    assert client.post("/feedback", json=row).status_code == 200
                    said += 1
            kill.join()
        kept = [row["person"] for row in log.rows()]
        # One that was kept, and not said before the kill, comes again.
        assert [*dict.fromkeys(kept)][:said] == [str(i) for i in range(said)]
        there = len(kept)
    assert said > 100 and there <= said + 100


def test_200_exchanges_under_load_lose_and_mix_no_request(runs, april, may) -> None:
    expected = {served.id: probabilities(served, TEXTS) for served in (april, may)}
    done, answered = threading.Event(), []

    def ask(start: int) -> None:
        with httpx.Client(base_url=str(client.base_url), timeout=60) as own:
            while not done.is_set():
                at = [(start + len(answered) + k) % 40 for k in range(1 + start % 3)]
                payload = {"inputs": [TEXTS[i] for i in at], "details": True}
                answered.append((at, own.post("/predict", json=payload)))

    with serving(runs) as (_, client):
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for i in range(200):
            name = {"round": "may" if i % 2 == 0 else "april"}
            path = "/admin/swap" if i % 4 < 2 else "/admin/rollback"
            swapped = client.post(path, json=name, headers=ADMIN)
            assert swapped.status_code == 200, swapped.text
        done.set()
        for thread in threads:
            thread.join()
    assert len(answered) > 200
    rounds = set()
    for at, response in answered:
        assert response.status_code == 200, response.text
        (id,) = {row["round"] for row in response.json()} | {response.headers["x-bhpeft-round"]}
        got = [row["scores"]["good"] for row in response.json()]
        assert got == pytest.approx([expected[id][i] for i in at], abs=1e-5)
        rounds.add(id)
    assert rounds == {april.id, may.id}


def test_nonsense_leaves_no_memory_behind(runs: Path) -> None:
    made = random.Random(1)

    def megabytes() -> float:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    with serving(runs) as (process, client):
        sizes = []
        for _ in range(4):
            for _ in range(1000):
                response = client.post(made.choice(PATHS), content=malformed(made))
                assert response.status_code in (200, 413, 422), response.text
            sizes.append(megabytes())
    print(sizes)
    assert sizes[-1] - sizes[1] < 10
