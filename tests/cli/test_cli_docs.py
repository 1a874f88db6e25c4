"""The commands of docs/cli.md and the README, as they stand there, on a tiny transformer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from program import read_csv, write_csv
from saves import backbone_in
from typer.main import get_command
from typer.testing import CliRunner

from bhpeft_pyro.cli.app import app
from bhpeft_pyro.model import backbone

ROOT = Path(__file__).parents[2]
TEXTS = [f"w{5 + i % 2} w{10 + i} w{40 - i}" for i in range(20)]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/cli.md", "README.md"])
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone_in(tmp_path / "tiny")
    monkeypatch.setitem(backbone.LOCAL, "minilm", lambda: tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    labels = ["good" if i % 2 else "bad" for i in range(20)]
    for name, word in (("reviews", "w2"), ("test", "w3"), ("tuesday", "w4"), ("week-2", "w4")):
        texts = [f"{text} {word}" for text in TEXTS]  # no two files are the same
        write_csv(Path(f"{name}.csv"), text=texts, label=labels)
    write_csv(Path("new.csv"), text=TEXTS)
    rows = [{"review": t, "verdict": v} for t, v in zip(TEXTS, labels, strict=True)]
    Path("films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dates = [f"2024-01-{1 + i:02}" for i in range(20)]
    for name in ("news", "history"):
        dated = [f"{text} w5" for text in TEXTS]
        write_csv(Path(f"{name}.csv"), date=dates, text=dated, label=labels)
    for content in blocks(page, "yaml"):
        Path("fit.yaml").write_text(content)
    commands = [
        line
        for block in blocks(page, "console")
        for line in block.splitlines()
        if line.startswith("bhpeft ")
    ]
    assert commands
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
    flagged = [row["flagged"] for row in read_csv(Path("new-predictions.csv"))]
    assert flagged.count("True") == 2  # 10 % of 20


def test_the_examples_of_the_help_are_options_that_exist() -> None:
    """Parsed, not run: they name files of the reader's."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        known = {flag for parameter in command.params for flag in parameter.opts}
        title, *examples = command.epilog.split("\n\n")
        assert title == "Examples:" and examples
        for example in examples:
            words = shlex.split(example.partition("|")[0])
            assert words[:2] == ["bhpeft", name]
            assert {word for word in words if word.startswith("--")} <= known, example
