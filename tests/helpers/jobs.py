"""What the tests of executors share."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from dataclasses import asdict
from typing import Any

import torch
from components import probabilities, same

import bhpeft_pyro as bh


class Inline(Executor):
    """Runs each job where it is submitted; its arguments and results are bytes all the same.

    Args:
        broken: numbers of jobs that end with an error of the executor's own.
    """

    def __init__(self, broken: tuple[int, ...] = (), error: BaseException | None = None) -> None:
        self.broken, self.error = broken, error
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.futures.append(future)
        if len(self.futures) - 1 not in self.broken:
            future.set_result(fn(*args, **kwargs))
        elif self.error is not None:
            future.set_exception(self.error)
        return future  # without an error, one that never ends


def _facts(report: Any) -> dict[str, Any]:
    found = asdict(report) | dict.fromkeys(("id", "created", "seconds", "parent"))
    return found | {"components": [_facts(each) for each in report.components]}


def assert_same(one: bh.Posterior, other: bh.Posterior) -> None:
    """The same mixtures, bit for bit; each has one network and as many priors as the other."""
    assert [*map(_facts, one.lineage)] == [*map(_facts, other.lineage)]
    for own, others in zip(one.components, other.components, strict=True):
        assert same(own, others)
        assert [*map(_facts, own.lineage)] == [*map(_facts, others.lineage)]
    assert torch.equal(probabilities(one), probabilities(other))
    for each in (one, other):
        assert {part.model.network for part in each.components} == {each.model.network}
    priors = [len({id(part.model.prior) for part in each.components}) for each in (one, other)]
    assert priors[0] == priors[1]
