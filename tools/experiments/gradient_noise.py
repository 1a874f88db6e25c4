"""How noisy each estimator of the bound's gradient is, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import Normal

from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.guides import Guide, LowRankGuide, NormalGuide, latents
from bhpeft_pyro.inference.draws import seeded
from bhpeft_pyro.inference.elbo import ELBO
from bhpeft_pyro.inference.passes import Feed
from bhpeft_pyro.model.model import Model

from .budgets import Budget
from .grid import commit, commits
from .job import Job, Load
from .methods import PEFT
from .results import complete, load
from .tables import Cell, Row, Table
from .tasks import split

__all__ = ["ABOUT", "gradient_noise", "losses", "noise"]

ABOUT = "How noisy is the gradient, for its time?"
_GUIDES = ("normal", "lowrank")
_SHARED = (1, 2, 4, 8, 16)  # draws that share a batch out
_BATCH, _GRADIENTS = 16, 50
_FIRST = "1 draw"
_VARIANCE, _TIME, _BOTH = "variance", "time", "variance x time"

Loss = Callable[[Batch], Tensor]


def gradient_noise(
    load_backbone: Load,
    backbone: str,
    budget: Budget,
    task: str,
    data: Path | None,
    seeds: int,
    out: Path,
) -> Table:
    """Measure what is missing, once a seed, and make the table of what is there.

    Args:
        load_backbone, backbone: makes the frozen transformer, and its name.
        task: a name in `budget.tasks`, to which the hybrid is fitted for a third of the steps.
        data: the folder of JSON lines files; None for the hub.
    """
    size = (budget.rows, budget.steps)
    runs = [("gradients", backbone, task, *size, seed) for seed in range(seeds)]

    def result(*run: object) -> dict[str, Any]:
        seed = int(str(run[-1]))
        what = budget.tasks[task]
        parts = split(data, what, budget.rows, budget.validation, budget.test, seed)
        kinds = PEFT["hybrid"]()
        job = Job(what, kinds, load_backbone, parts.train, parts.validation, seed, budget)
        found = {guide: _measure(job, guide) for guide in _GUIDES}
        return {"commit": commit(), "guides": found}

    complete(out, runs, result)
    return _table(load(out, runs), backbone, task, budget)


def _measure(job: Job, name: str) -> dict[str, dict[str, float]]:
    posterior = job.fit(job.model(), name, max_steps=max(1, job.budget.steps // 3))
    model, guide = posterior.model, posterior.guide
    assert isinstance(guide, Guide)
    examples = posterior.encode(job.train)
    feed, generator = Feed(model, examples), torch.Generator().manual_seed(job.seed)
    batches: list[Batch] = []
    while len(batches) < _GRADIENTS:
        batches += feed.training(_BATCH, _BATCH, generator)
    whole = [batch.split(1).to(model.network.device) for batch in batches[:_GRADIENTS]]
    with seeded(job.seed):
        return noise(losses(model, guide), model, guide, whole)


def losses(model: Model, guide: Guide) -> dict[str, Loss]:
    """Estimators of the same bound, by name, for batches that are not split."""

    def drawn(draws: int, share: bool = True) -> Loss:
        elbo = ELBO(draws)(model, guide)
        return lambda batch: elbo(batch.split(draws if share else 1))

    found = {_FIRST: drawn(1)}
    found |= {f"{k} draws, each for its share of the batch": drawn(k) for k in _SHARED[1:]}
    found["4 draws, each for the whole batch"] = drawn(4, share=False)
    if isinstance(guide, NormalGuide):
        plain = Trace_ELBO(max_plate_nesting=1)(model, guide)
        found["1 draw, KL at the draw"] = plain
        found["1 draw, sticking the landing"] = lambda batch: _landing(model, guide, batch)
    return found


def _landing(model: Model, guide: NormalGuide, batch: Batch) -> Tensor:
    """log q(w) - log p(y, w) with no gradient by q's own parameters (Roeder et al. 2017)."""
    trace = poutine.trace(guide).get_trace(batch)
    joint = poutine.trace(poutine.replay(model, trace=trace)).get_trace(batch)
    means, scales = guide.means(), guide.scales()
    entropy = [
        Normal(means[name], scales[name]).log_prob(trace.nodes[name]["value"]).sum()
        for name in means
    ]
    return torch.stack(entropy).sum() - joint.log_prob_sum()


def noise(
    each: Mapping[str, Loss], model: Model, guide: Guide, batches: Sequence[Batch]
) -> dict[str, dict[str, float]]:
    """The variance of each loss's gradient by the guide's means, and the time it takes.

    Args:
        each: losses by name.
        batches: the same for all losses, so that their own noise is in every variance.

    Returns:
        By name the variance, summed over the weights in units of the prior's sds, and the seconds
        of the processor for one gradient.
    """
    sds = {latent.name: latent.scale for latent in latents(model)}
    slopes: dict[str, list[Tensor]] = {name: [] for name in each}
    seconds = dict.fromkeys(each, 0.0)
    for batch in batches:
        for name, loss in each.items():
            guide.zero_grad()
            started = time.process_time()
            loss(batch).backward()
            seconds[name] += time.process_time() - started
            slopes[name].append(_slope(guide, sds))
    return {
        name: {
            _VARIANCE: torch.stack(found).var(0).sum().item(),
            _TIME: seconds[name] / len(batches),
        }
        for name, found in slopes.items()
    }


def _slope(guide: Guide, sds: Mapping[str, Tensor]) -> Tensor:
    """The gradient by the means, in units of the prior's sds."""
    if isinstance(guide, LowRankGuide):
        assert guide.loc.grad is not None
        grads = guide.unpack(guide.loc.grad)
    else:
        assert isinstance(guide, NormalGuide)
        grads = {
            name: loc.grad
            for name, (loc, _) in zip(guide.means(), guide.natural_pairs(), strict=True)
            if loc.grad is not None
        }
    return torch.cat([(grads[name] * sd).flatten() for name, sd in sds.items()])


def _table(results: Sequence[Mapping[str, Any]], backbone: str, task: str, budget: Budget) -> Table:
    rows = []
    for guide in _GUIDES:
        first = [result["guides"][guide][_FIRST] for result in results]
        for name in results[0]["guides"][guide]:
            own = [result["guides"][guide][name] for result in results]
            pairs = list(zip(own, first, strict=True))
            ratios = {
                column: [a[column] / b[column] for a, b in pairs] for column in (_VARIANCE, _TIME)
            }
            ratios[_BOTH] = [v * t for v, t in zip(*ratios.values(), strict=True)]
            cells = {column: Cell.of(values) for column, values in ratios.items()}
            rows.append(Row((guide, name), cells))
    note = (
        f"Commit {commits(results)}; {backbone}; the hybrid on {task}, {budget.rows} rows, "
        f"fitted for {max(1, budget.steps // 3)} steps; {_GRADIENTS} gradients of batches of "
        f"{_BATCH}. "
        f"Variance of the gradient by the means, that of batches included, over that of one draw "
        f"a batch; processor time likewise. Mean ± standard error over {len(results)} fits."
    )
    return Table("gradients", ("guide", "estimator"), (_VARIANCE, _TIME, _BOTH), rows, note)
