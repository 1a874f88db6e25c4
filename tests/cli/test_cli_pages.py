"""The commands of docs/cli.md and the README, as they stand there, on a tiny transformer."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from program import read_csv, write_csv
from saves import backbone_in
from typer.main import get_command
from typer.testing import CliRunner

from bhpeft_pyro.cli.app import app
from bhpeft_pyro.data import assets
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
    shutil.copytree(assets.sample(), "shop")
    for number, path in enumerate(sorted(Path("shop").glob("*.csv"))):
        rows = read_csv(path)
        few = rows[::4] if path.stem == "march" else rows  # a fourth of each week is quick
        for i, row in enumerate(few):  # in words that the tiny tokenizer knows
            row["text"] = f"w{5 + i % 2} w{9 + (7 * i + number) % 40} w{9 + (11 * i + number) % 39}"
        write_csv(path, **{name: [row[name] for row in few] for name in few[0]})
    rows = [{"review": t, "verdict": v} for t, v in zip(TEXTS, labels, strict=True)]
    Path("films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    flagged = [row["flagged"] for row in read_csv(Path("shop/new-predictions.csv"))]
    assert flagged.count("True") == 3  # 10 % of 24, rounded up


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
