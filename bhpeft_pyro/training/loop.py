"""Stochastic variational inference: the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..base.fit_options import FitOptions
from ..base.isolation import own_parameters, seeded
from ..base.progress import Work, bars, work
from ..data import Examples
from ..data.batch import Batch
from ..errors import DataError, FitError
from ..guides import Guide
from ..guides.guide import check_no_others, trained
from ..guides.strategy import Earlier
from ..model.cached_batches import CachedBatches, check_all
from ..model.model import Model
from ..prediction.predict import predict
from .convergence import Descent, at_the_end, culprit, mean_kl, unsettled
from .earlier_labels import with_earlier_texts
from .early_stopping import FEWEST, EarlyStopping, copied
from .elbo import ELBO
from .estimated_noise import has_noise, noise_of, pool_noise, settle_noise
from .report import Training

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
"""From parameters to a torch optimiser of them."""
Callback = Callable[[dict[str, float]], object]
"""Gets a copy of each step's entry of `FitReport.history`."""

_MAX_SKIPPED = 5  # consecutive steps without a finite loss, after which a fit stops
_WARM_UP = 0.05  # of the steps, in which the learning rate rises
_EVALUATION_DRAWS = 8  # of weights; early stopping compares means over rows, which need few


@dataclass(frozen=True, eq=False)
class Setup:
    """What a guide is to learn, from where, and how.

    Attributes:
        model: under the prior of the round.
        guide: with its initial values; it is fitted in place.
        data: what the guide learns.
        held_out: rows that choose the state of a point estimate that no prior holds; otherwise they
            stop the fit early if `options.patience` is set.
        options: how to fit, with the seed of this component.
        temperature: the weight of the KL to the prior, given or by default.
        earlier: what earlier rounds have learnt; None in the first round.
        optimizer, callback: as for `fit`.
    """

    model: Model
    guide: Guide
    data: Examples | CachedBatches
    held_out: Examples | None
    options: FitOptions
    _: KW_ONLY
    temperature: float
    earlier: Earlier | None = None
    optimizer: OptimizerFactory | None = None
    callback: Callback | None = field(default=None, repr=False)

    @property
    def pools_noise(self) -> bool:
        """Whether the noise scale of ratings is pooled with that of earlier rounds."""
        later = self.earlier is not None and self.held_out is None and self.options.default_length
        return later and has_noise(self.guide, self.model)


def optimise(setup: Setup) -> Training:
    """Fit the guide's parameters in place.

    Raises:
        FitError: the loss was not finite for five steps in a row, or at the end; the guide is in
            its last good state, and the error's `training` is what was done.
    """
    run = _Run(setup)
    try:
        return run.run()
    except FitError as error:
        error.training = run.so_far()
        raise


class _Run:
    """The state of one fit."""

    def __init__(self, setup: Setup) -> None:
        model, data, held_out = setup.model, setup.data, setup.held_out
        self.setup, self.guide, self.earlier = setup, setup.guide, setup.earlier
        examples = data.examples if isinstance(data, CachedBatches) else data
        learnt, self.labels = with_earlier_texts(self.earlier, examples)
        self.feed = data if isinstance(data, CachedBatches) else CachedBatches(model, learnt)
        self.size = len(examples)
        self.validation = None if held_out is None else CachedBatches(model, held_out)
        guide, feed, later = self.guide, self.feed, self.earlier is not None
        self.options = options = setup.options
        self.model, weight, self.least = guide.strategy.objective(model, setup.temperature, later)
        self.point = guide.point
        self.done, self.skipped = 0, 0  # steps
        self.history: list[dict[str, float]] = []
        self.particles = 1 if self.point else options.particles
        self.generator = torch.Generator().manual_seed(options.seed)
        self.batches: Iterator[Batch] = self._endless()
        per_epoch = -(-len(feed.examples) // (options.batch_size))
        rows = 0 if held_out is None else len(held_out)
        free = self.point and options.temperature is None and setup.temperature == 0 and not later
        self.settles = free and rows > 0
        ratings = model.likelihood.kind == "rating"
        # A head alone does not overfit so soon.
        tuned = self.settles and bool(model.network.kinds)
        unchosen = (later and self.point) or (tuned and rows < FEWEST)
        self.steps = options.steps(per_epoch, brief=unchosen or (tuned and not ratings))
        # Such a fit is short on purpose: its loss still falls.
        self.ends_early = unchosen and options.default_length
        self.selects = self.settles and not self.ends_early
        self.stopping = EarlyStopping(guide, options, self.steps, per_epoch, self.selects, ratings)
        self.elbo = ELBO(self.particles, weight)
        self.loss: ELBOModule = self.elbo(self.model, guide)
        self.good: dict[str, Tensor] = {}  # the last state with a finite loss and gradient
        self.slopes: list[tuple[int, dict[str, Tensor]]] = []
        self.descent = Descent(self.steps)

    def run(self) -> Training:
        bf16 = self.options.bf16
        with (
            seeded(self.options.seed),
            own_parameters(),
            ExitStack() as checks,
            bars(self.options.progress),
            work("training", self.steps) as bar,
        ):
            checks.enter_context(self.labels or nullcontext())
            self._prepare()
            later = self.earlier is not None and self.ends_early
            if self.setup.pools_noise:
                last = self.model.likelihood.log_noise(self.guide.means()).detach().clone()
                before = noise_of(self.model, self.guide, self.feed, bf16)[1]
            # Argument checks have passed once; in the loop, non-finite values are handled.
            checks.enter_context(pyro.validation_enabled(False))
            self._train(bar)
            best_step = self.stopping.restore()
            if later and self.earlier is not None:
                self.guide.strategy.average(self.earlier.step(self.size))
                if self.setup.pools_noise:
                    here = before, noise_of(self.model, self.guide, self.feed, bf16)[1]
                    pool_noise(self.model, self.guide, last, here, self.earlier.share(self.size))
            if has_noise(self.guide, self.model):
                if self.validation is not None and (self.settles or later):
                    settle_noise(self.model, self.guide, self.validation, bf16)
                elif self.validation is None and self.earlier is None:  # a few rows and steps
                    settle_noise(self.model, self.guide, self.feed, bf16, learnt=True)
            assert self.elbo.parts is not None
            batch = next(self.batches).to(self.model.network.device)
            # Anew, as the state that is kept may be an earlier one.
            kl = mean_kl(self.guide, self.model, batch, self.particles)
            parts = self.elbo.parts = self.elbo.parts._replace(kl=kl)
            if not all(value.isfinite() for value in kl.values()):
                raise self._diverged("at the end")
            return self.so_far(
                best_step=best_step,
                falling=best_step is None and not self.ends_early and self.descent.goes_on(),
                unsettled=unsettled(self.slopes, best_step or self.done, self.setup.temperature),
                **at_the_end(self.guide, self.model, parts),
            )

    def so_far(self, **more: Any) -> Training:
        """What was done, with more fields at the end."""
        return Training(steps=self.done, skipped=self.skipped, history=self.history, **more)

    def _train(self, bar: Work) -> None:
        options = self.options
        if self.setup.optimizer is not None:
            steppers = [self.setup.optimizer(trained(self.guide))]
        else:
            steppers = self.guide.optimizers(options, len(self.feed.examples))
        schedulers = [LambdaLR(stepper, partial(_rate, steps=self.steps)) for stepper in steppers]
        bad, note = 0, ""  # steps in a row; the held-out NLL
        for step in range(1, self.steps + 1):
            self.done = step
            entry = self._step(step, steppers)
            if entry is None:
                if self.skipped == 0 and self.feed.features is None:
                    check_all(self.model, data=self.feed.examples)
                self.skipped += 1
                bad += 1
                if bad >= _MAX_SKIPPED:
                    raise self._diverged(
                        f"for {bad} steps in a row (last step: {step} of {self.steps})"
                    )
                bar.next()
                continue
            bad = 0
            self.history.append(entry)
            for scheduler in schedulers:
                scheduler.step()
            stops = False
            if self.validation is not None and self.stopping.is_due(step):
                try:
                    with bars(False):  # one step's part, whose title stays
                        rows = self._evaluate()
                except DataError as error:
                    if error.rows:
                        raise
                    # The guide has diverged, as the next steps find too, or one draw was too far.
                else:
                    entry["validation_nll"] = rows.mean().item()
                    note = f", held-out NLL {entry['validation_nll']:.3f}"
                    stops = self.stopping.ends(step, rows)
            bar.next(f"loss {entry['loss']:.3f}{note}")
            if self.setup.callback is not None:
                self.setup.callback({**entry})
            if stops:
                break
        if not self.history:
            raise FitError(
                f"the loss was not finite at any of {self.steps} steps, first at "
                f"{culprit(self.guide, self.elbo.parts)}; the guide has its initial values"
            )

    def _diverged(self, when: str) -> FitError:
        """The error, with the guide in its last good state."""
        where = culprit(self.guide, self.elbo.parts)
        self.guide.load_state_dict(self.good)
        return FitError(
            f"the loss was not finite {when}, first at {where}; the last good state is kept"
        )

    def _endless(self) -> Iterator[Batch]:
        while True:
            size = self.options.batch_size
            yield from self.feed.training(size, self.particles, self.generator)

    def _prepare(self) -> None:
        """Let lazy guides create their parameters, and check that guide and model fit together."""
        device = self.model.network.device
        _, whole = next(iter(self.feed.prediction(self.options.batch_size)))
        with torch.no_grad():
            # Pyro's guides take the shapes of the latents from a first call without particles.
            self.guide(whole.to(device))
            batch = next(self.batches)
            self.batches = chain([batch], self.batches)  # it is trained on later
            self.loss(batch.to(device))
        self.good = copied(self.guide.state_dict())

    def _step(self, step: int, steppers: list[Optimizer]) -> dict[str, float] | None:
        """One optimiser step; None if it was skipped: the loss or gradient was not finite."""
        options, device, size = self.options, self.model.network.device, self.size
        for optimizer in steppers:
            optimizer.zero_grad()
        batch = next(self.batches).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            value = self.loss(batch)
        if step == 1:
            check_no_others(value, self.guide)
        value.backward()
        if step == 1:
            self.guide.check_trained()
        params = [p for p in self.guide.parameters() if p.grad is not None]
        gradients = [p.grad for p in params if p.grad is not None]
        assert self.elbo.parts is not None
        nll, evidence = self.elbo.parts.nll.item(), self.elbo.parts.evidence.item()
        kl = sum(value.item() for value in self.elbo.parts.kl.values()) - self.least
        temperature = self.elbo.temperature
        loss = nll + temperature * kl + evidence
        norm = nn.utils.get_total_norm(gradients)
        if not (math.isfinite(loss) and torch.isfinite(norm)):
            return None
        if step % 10 == 1:
            self.good = copied(self.guide.state_dict())
        self.slopes.append((step, self.guide.scale_slopes()))
        lr = steppers[0].param_groups[0]["lr"]
        # Where held-out rows choose the state, the loss of the training rows is no measure.
        with nullcontext() if self.selects else self.descent.step(params, lr, size):
            for optimizer in steppers:
                optimizer.step()
        return {
            "step": step,
            "loss": loss / size,
            "nll": nll / size,
            "kl": (kl + evidence / temperature if temperature else kl) / size,
            "draws": 0 if self.point else self.particles,
            "temperature": temperature,
            "lr": lr,
            "gradient": norm.item() / size,
        }

    def _evaluate(self) -> Tensor:
        """(N,) NLLs of the validation rows; for a point estimate of ratings, with the noise scale
        that suits these rows (`training.estimated_noise`)."""
        assert self.validation is not None
        bf16 = self.options.bf16
        if has_noise(self.guide, self.model):
            return noise_of(self.model, self.guide, self.validation, bf16)[0]
        samples = 0 if self.point else _EVALUATION_DRAWS
        return predict(self.model, self.guide, self.validation, samples, bf16=bf16).nlls()


def _rate(done: int, steps: int) -> float:
    """The share of the learning rate that is used after `done` of the steps."""
    rise = int(_WARM_UP * steps)
    if done < rise:
        return (done + 1) / (rise + 1)
    progress = (done - rise) / (steps - rise)
    return 0.5 * (1 + math.cos(math.pi * progress))
