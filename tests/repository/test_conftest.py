"""The guards of conftest.py trip, and clean up after what they caught."""

from __future__ import annotations

from pathlib import Path

import pytest

LEAKS = {
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "grad mode": "torch.set_grad_enabled(False)",
    "number of threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "Pyro settings": "pyro.enable_validation(False)",
    "Pyro param store": "pyro.param('left', torch.zeros(()))",
    "Pyro effect handlers": "pyro.poutine.block().__enter__()",
    "attention functions": "transformers.AttentionInterface.register('other', print)",
    "attention mask functions": "transformers.AttentionMaskInterface.register('sdpa', print)",
}
CLEAN = "transformers.AttentionInterface.register('bhpeft_sdpa', print)"


def test_each_leak_is_caught_and_undone(pytester: pytest.Pytester) -> None:
    """Every leaky test is followed by one that is clean: it passes only if the leak was undone."""
    tests = [
        f"def test_{i}_leaks():\n    {leak}\ndef test_{i}_after():\n    pass\n"
        for i, leak in enumerate(LEAKS.values())
    ]
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile("import pyro, torch, transformers\n" + "".join(tests))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2 * len(LEAKS), errors=len(LEAKS))
    result.stdout.fnmatch_lines_random([f"{name}: * before, * after" for name in LEAKS])


def test_registering_our_own_attention_is_no_leak(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile(f"import transformers\ndef test_ours():\n    {CLEAN}\n")
    before = dict(_attention())
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    _attention().clear()
    _attention().update(before)
    result.assert_outcomes(passed=1)


def test_draws_do_not_depend_on_the_test_before(pytester: pytest.Pytester) -> None:
    body = "import numpy, random, torch\nseen = []\n" + "".join(
        f"def test_{i}():\n"
        "    seen.append((torch.rand(()).item(), numpy.random.rand(), random.random()))\n"
        "    assert seen[-1] == seen[0]\n"
        for i in range(2)
    )
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile(body)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


def _attention() -> dict[str, object]:
    from transformers import AttentionInterface

    return AttentionInterface._global_mapping
