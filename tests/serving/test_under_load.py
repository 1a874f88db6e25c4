"""A server of its own: killed, exchanged under load, and sent nonsense."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from services import PATHS, malformed, probabilities, until

from bhpeft_pyro.serving.feedback import FILE
from bhpeft_pyro.testing import tiny_examples

pytestmark = pytest.mark.slow
TEXTS = [*tiny_examples(40, seed=9).texts]
ADMIN = {"authorization": "Bearer secret"}


@contextmanager
def serving(runs: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`bhpeft serve` in a process of its own, once it is ready."""
    command = (sys.executable, "-m", "bhpeft_pyro", "serve", runs, "--round", "april")
    process = subprocess.Popen(
        [*map(str, command), "--port", str(port), "--device", "cpu"],
        env={**os.environ, "BHPEFT_ADMIN_TOKEN": "secret"},
        stderr=subprocess.DEVNULL,
    )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def ready() -> bool:
        try:
            return client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(ready, 120)
        yield process, client
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "runs", tmp_path / "runs"))


def test_a_kill_loses_no_label(runs: Path) -> None:
    said, file = 0, runs / "april" / FILE
    for kill in range(3):
        with serving(runs, 18761) as (process, client):
            if file.exists():
                labels = client.get("/feedback").json()["labels"]
                assert labels == len(file.read_text().splitlines())
            threading.Timer(0.3 + 0.2 * kill, process.kill).start()
            try:
                while True:
                    row = {"text": TEXTS[said % 40], "label": "bad", "by": str(said)}
                    assert client.post("/feedback", json=row).status_code == 200
                    said += 1
            except httpx.TransportError:
                pass
        kept = [json.loads(line)["feedback"]["by"] for line in file.read_text().splitlines()]
        assert [*dict.fromkeys(kept)][:said] == [str(i) for i in range(said)]
        assert len(kept) <= said + 1 + kill  # written, and not said when it was killed
    assert said > 3


def test_200_exchanges_under_load_lose_and_mix_no_request(runs, april, may) -> None:
    expected = {served.id: probabilities(served, TEXTS) for served in (april, may)}
    done, answers = threading.Event(), []

    def ask(start: int) -> None:
        with httpx.Client(base_url=str(client.base_url), timeout=60) as own:
            while not done.is_set():
                at = [(start + len(answers) + k) % 40 for k in range(1 + start % 3)]
                payload = {"inputs": [TEXTS[i] for i in at], "details": True}
                answers.append((at, own.post("/predict", json=payload)))

    with serving(runs, 18762) as (_, client):
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
    assert len(answers) > 200
    rounds = set()
    for at, response in answers:
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
    with serving(runs, 18763) as (process, client):
        sizes = []
        for _ in range(4):
            for _ in range(1000):
                response = client.post(made.choice(PATHS), content=malformed(made))
                assert response.status_code in (200, 413, 422), response.text
            sizes.append(megabytes())
    print(sizes)
    assert sizes[-1] - sizes[1] < 10
