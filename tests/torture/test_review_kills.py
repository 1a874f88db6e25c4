"""The page is killed at any moment while people label: no label that was confirmed is lost.

The small run is in the suite; for the large one, with its counts:

    python -m pytest -m torture -s tests/torture/test_review_kills.py
"""

from __future__ import annotations

import http.client
import os
import random
import re
import signal
import socket
import threading
import urllib.parse
from pathlib import Path

import pytest
from forks import start, wait
from pools import page_in, pool, session_in

from bhpeft_pyro.data import table

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
TEXTS = pool(3000)


def serve(folder: Path, listening: socket.socket) -> None:
    *_, app = page_in(folder, TEXTS)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run([listening])


def label(port: int, who: str) -> tuple[str, str] | None:
    """Label the next text, as a person does; text and label once that is confirmed."""
    page = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        page.request("GET", f"/secret/by/{who}/")
        found = re.search(r'text/(t\d+)" class="decide"', page.getresponse().read().decode())
        assert found is not None
        option = random.randrange(3)
        form = urllib.parse.urlencode({"label": option})
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        page.request("POST", f"/secret/by/{who}/text/{found[1]}", form, kind)
        answer = page.getresponse()
        return (found[1], TEXTS.items["t0"].options[option]) if answer.status == 303 else None
    finally:
        page.close()


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.torture)])
def test_no_label_is_lost(tmp_path: Path, kills: int) -> None:
    random.seed(kills)
    confirmed: dict[str, str] = {}
    unsure = 0
    for number in range(kills):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            child = start(lambda listening=listening: serve(tmp_path, listening))
        timer = None
        try:
            while True:
                for who in ("Ana", "Bo"):
                    if (made := label(port, who)) is None:
                        raise AssertionError("a label was refused")
                    confirmed[made[0]] = made[1]
                if timer is None:  # it has begun
                    delay = random.uniform(0, 0.3)
                    timer = threading.Timer(delay, os.kill, (child, signal.SIGKILL))
                    timer.start()
        except (OSError, http.client.HTTPException):
            unsure += 1
        assert timer is not None
        timer.join()
        assert wait(child) == -signal.SIGKILL
        session = session_in(tmp_path, TEXTS)
        kept = {one.key: one.label for who in ("Ana", "Bo") for one in session.recent(who, 10**6)}
        assert kept.items() >= confirmed.items(), f"lost by kill {number}"
        assert len(kept) <= len(confirmed) + unsure
        rows = table(tmp_path / "labels.csv")
        assert dict(zip(rows["text"], rows["label"], strict=True)) == {
            f"text {key[1:]}": label for key, label in kept.items()
        }
    print(f"{kills} kills, {len(confirmed)} labels confirmed, all kept")
