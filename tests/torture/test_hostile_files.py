"""Random files and command lines: an answer or a message, never a traceback."""

from __future__ import annotations

import collections
import random
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bhpeft_pyro.cli.app import app


@pytest.mark.parametrize("times", [25, pytest.param(1250, marks=pytest.mark.torture)])
def test_command_lines_and_their_files(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 0, 1 or 2, no traceback, and nothing that would control the terminal."""
    runner, group = CliRunner(), typer.main.get_command(app)
    names = [*group.commands]  # type: ignore[attr-defined]
    words = ["--config", "c.yaml", "--out", "--seed", "--flag", "--by", "--data", "10%", "-1"]
    words += ["1e9", "nan", "9" * 30, "a" * 300, "\x1b[31m", "", ".", "t.csv", "t.jsonl", "["]
    lines = ["seed: 3", "epochs: 2024-13-45", "a: [", "seed: {}", "lr: 1:2", "null: 3"]
    lines += ["? [a]\n: b", "&a [*a]", "seed: 0x", "out: \x01", "-" * 400]
    lines += ["seed: !!python/object:os.system x"]
    cells = ["text", "label", "w5", "", "\0", '"', ",", "\n", "\r", "0", "1", "é", "\x1b[31m"]
    json = ['{"text": "w5", "label": 0}', '{"text": 1, "text": 2}', "[" * 5000, "{", "[]"]
    found: collections.Counter[int] = collections.Counter()
    monkeypatch.chdir(tmp_path)
    for number in range(times):
        draw = random.Random(number)
        Path("c.yaml").write_text("\n".join(draw.choices(lines, k=2)))
        Path("t.csv").write_text("text,label\n" + ",".join(draw.choices(cells, k=9)))
        if draw.random() < 0.5:
            Path("t.csv").write_text(",".join(draw.choices(cells, k=12)))
        Path("t.jsonl").write_text("\n".join(draw.choices(json, k=2)))
        given = [draw.choice(names), *draw.choices(words, k=draw.randrange(6))]
        if draw.random() < 0.4:
            given = ["fit", draw.choice(("t.csv", "t.jsonl")), "--out", "o", "--backbone", "no"]
        result = runner.invoke(app, given)
        assert isinstance(result.exception, SystemExit | None), (number, given, result.exception)
        assert result.exit_code in (0, 1, 2), (number, given)
        assert "\x1b[31m" not in result.output, (number, given)
        found[result.exit_code] += 1
    print(dict(found))
