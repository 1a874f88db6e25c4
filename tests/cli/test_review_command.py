"""`bhpeft review`: what it refuses, what it prints, and that it goes on where it was."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browsers import chromium, press, shown
from program import bhpeft, error, loaded, write_csv

from bhpeft_pyro.cli.label_commands import _beside
from bhpeft_pyro.data import table

pytest.importorskip("starlette")
CPU = ("--device", "cpu")


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "new.csv", id=range(12), text=[f"w{i} w9" for i in range(12, 24)])


class Page:
    """The program in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "bhpeft_pyro", "review", *map(str, arguments), *CPU]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said = ""
        while not (found := re.search(r"open (http://127\.0\.0\.1:\d+/\S+/)by/", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.address = found[1]

    def fetch(self, path: str, **form: str) -> str:
        data = urllib.parse.urlencode(form).encode() if form else None
        with urllib.request.urlopen(self.address + path, data, timeout=30) as answer:
            return answer.read().decode()

    def label(self) -> str:
        """Label the text that is shown; its key."""
        key = re.search(r'by/Ana/text/(\w+)" class="decide"', self.fetch("by/Ana/"))
        assert key is not None
        self.fetch(f"by/Ana/text/{key[1]}", label="1")
        return key[1]

    def end(self, by: int) -> tuple[int, str]:
        self.process.send_signal(by)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def begin() -> Iterator[Callable[..., Page]]:
    """Starts the program; none is left at the end."""
    pages: list[Page] = []

    def start(*arguments: object) -> Page:
        pages.append(Page(*arguments))
        return pages[-1]

    yield start
    for page in pages:
        page.process.kill()


def test_labels_survive_a_kill_and_are_taken_up_again(begin, run, pool, tmp_path):
    out = tmp_path / "labels.db"
    page = begin(run, pool, "--out", out)
    assert "12 of 12 texts to label" in page.said
    keys = [page.label() for _ in range(4)]
    page.end(signal.SIGKILL)
    rows = table(str(out))
    assert [*rows["key"]] == keys and [*rows["label"]] == ["good"] * 4
    page = begin(run, pool, "--out", out)
    assert "which holds 4 so far" in page.said
    assert page.label() not in keys
    code, said = page.end(signal.SIGINT)
    assert code == 0 and f"5 labels in {out}; next: bhpeft update {run} {out}" in said
    assert len(table(str(out))) == 5


def test_the_new_round_is_beside_the_run_wherever_one_is(tmp_path, monkeypatch):
    (tmp_path / "run" / "inner").mkdir(parents=True)
    for folder, given in (("", "run"), ("run", "."), ("run/inner", "..")):
        monkeypatch.chdir(tmp_path / folder)
        assert _beside(Path(given)) == tmp_path.resolve() / "run-reviewed"
    for of_stream in ("weeks", "weeks/rounds", "weeks/rounds/0123456789ab"):
        assert _beside(tmp_path / of_stream) == tmp_path.resolve() / "weeks-reviewed"


def test_what_is_refused(begin, run, folder, pool, tmp_path, labels):
    out = ("--out", tmp_path / "labels.db")
    assert "should end in .db or .sqlite" in error(
        "review", run, pool, "--out", tmp_path / "labels.json"
    )
    other = ("--new-round", labels / "run")
    assert "is no round of" in error("review", run, pool, *out, *other, *CPU)
    (tmp_path / "weeks" / "rounds").mkdir(parents=True)
    (tmp_path / "weeks" / "record.json").touch()
    inside = ("--new-round", tmp_path / "weeks" / "rounds" / "next")
    assert "is among the rounds of a stream" in error("review", run, pool, *out, *inside)
    taken = begin(run, pool, *out)
    port = re.search(r":(\d+)/", taken.address)
    assert port is not None
    refused = error("review", run, pool, *out, "--port", port[1], *CPU)
    assert "cannot be used: Address already in use" in refused


def test_a_second_page_of_one_table_is_refused(begin, run, pool, tmp_path):
    """It would show the texts that the first one shows."""
    out = ("--out", tmp_path / "labels.db")
    first = begin(run, pool, *out)
    refused = error("review", run, pool, *out, *CPU, code=1)  # as of any folder in use
    assert "--out: another page labels into" in refused
    begin(run, pool, "--out", tmp_path / "others.db")
    first.end(signal.SIGKILL)
    begin(run, pool, *out).end(signal.SIGINT)
    assert not [*tmp_path.glob(".labels*")]


@pytest.mark.slow
def test_label_kill_resume_and_update_in_a_browser(begin, run, folder, pool, tmp_path):
    out = tmp_path / "labels.db"
    new = ("--new-round", tmp_path / "next")
    with chromium() as browser:
        page = browser.new_page()
        program = begin(run, pool, "--out", out, *new)
        page.goto(f"{program.address}by/Ana/")
        seen = []
        for key in "121":
            seen.append(shown(page))
            press(page, key)
        following = shown(page)
        program.end(signal.SIGKILL)

        program = begin(run, pool, "--out", out, *new)
        page.goto(f"{program.address}by/Ana/")
        assert shown(page) == following and "3 decided by you, 9 to go" in page.inner_text("header")
        with page.expect_navigation():
            page.click("#update")
        press(page, "1")  # labels go on beside it
        page.wait_for_selector("text=Round 2 has learnt", timeout=120_000)
        press(page, "1")
        assert "round 2" in page.inner_text("header")
        assert not {shown(page)} & {*seen, following}
        program.end(signal.SIGKILL)

        program = begin(run, pool, "--out", out, *new)
        assert "going on with the round in" in program.said
        page.goto(f"{program.address}by/Ana/")
        assert "round 2" in page.inner_text("header") and "5 decided" in page.inner_text("header")
    learnt = loaded(tmp_path / "next", folder)
    assert [report.examples for report in learnt.lineage][1] in (3, 4)
    bhpeft("update", run, out, "--out", tmp_path / "by-hand", "--max-steps", 2, *CPU)
