"""What `import bhpeft_pyro` brings with it."""

from __future__ import annotations

import subprocess
import sys

DEAR = ("arviz", "arviz_stats", "matplotlib", "peft", "torchmetrics", "typer", "xarray")


def test_an_import_waits_for_nothing_that_only_some_functions_need() -> None:
    """Metrics brought torchmetrics and scipy.signal, streams Matplotlib, a fit's schedules the
    Trainer and Hugging Face's peft: a fifth of the time."""
    code = (
        "import sys, bhpeft_pyro as bh\n"
        "print(*sys.modules)\n"
        "print(bh.sequential.figures.overview.__name__, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
    )
    modules, asked_for = done.stdout.splitlines()
    assert [name for name in DEAR if name in modules.split()] == []
    assert asked_for == "overview True"
