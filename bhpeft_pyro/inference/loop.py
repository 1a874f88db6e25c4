"""Stochastic variational inference: the loop over steps, with a torch optimiser."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..data import Examples
from ..data.batch import Batch
from ..errors import ConfigError, FitError
from ..forecast import RatingForecast
from ..forecast.metrics import nlls
from ..guides import FunctionGuide, Guide
from ..guides.guide import is_point, optimizers
from ..guides.optimizers import trained
from ..model.model import Model
from .convergence import Watch, culprit
from .draws import sampling, seeded
from .elbo import ELBO
from .passes import Feed, check_all
from .predict import predict
from .report import FitReport

__all__ = [
    "OptimizerFactory",
    "as_module",
    "optimise",
]


OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

_MAX_SKIPPED = 5  # steps in a row without a finite loss, after which a fit gives up
_CHECKS = 10  # evaluations of a point estimate, of which the best state may be kept


def optimise(
    model: Model,
    guide: nn.Module,
    data: Examples | Feed,
    validation: Examples | None,
    report: FitReport,
    optimizer: OptimizerFactory | None = None,
) -> None:
    """Fit the guide's parameters in place, as `report.options` say, and fill in the report.

    Raises:
        FitError: the loss was not finite for five steps in a row; the guide is left in its last
            good state.
    """
    feed = data if isinstance(data, Feed) else Feed(model, data)
    _Run(model, guide, feed, validation, report, optimizer).run()


class _Run:
    """The state of one fit."""

    def __init__(
        self,
        model: Model,
        guide: nn.Module,
        feed: Feed,
        validation: Examples | None,
        report: FitReport,
        optimizer: OptimizerFactory | None,
    ) -> None:
        self.model, self.guide, self.report = model, guide, report
        self.options = options = report.options
        self.temperature = report.temperature
        self.point = is_point(guide)
        self.particles = 1 if self.point else options.particles
        self.feed = feed
        self.validation = None if validation is None else Feed(model, validation)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.batches: Iterator[Batch] = self._endless(self.particles)
        per_epoch = -(-len(feed.examples) // (options.batch_size * options.accumulate))
        self.steps = options.max_steps or options.epochs * per_epoch
        self.eval_every = options.eval_every or min(per_epoch, self.steps)
        self.selects = report.selects and self.validation is not None
        if self.selects:
            self.eval_every = options.eval_every or max(1, self.steps // _CHECKS)
        self.elbo = ELBO(self.particles, self.temperature)
        self.loss: ELBOModule = self.elbo(model, guide)
        self.optimizer = optimizer
        self.good: dict[str, Tensor] = {}  # the last state with a finite loss and gradient
        self.watch = Watch(guide)

    def run(self) -> None:
        from transformers import get_scheduler  # brings the Trainer with it, slow to import

        options, report = self.options, self.report
        started = time.monotonic()
        with (
            sampling(),
            seeded(options.seed),
            pyro.get_param_store().scope(),
            ExitStack() as checks,
            tqdm(total=self.steps, disable=not options.progress, desc="fit", unit="step") as bar,
        ):
            self._prepare()
            # Argument checks have passed once; in the loop a NaN is ours to handle.
            checks.enter_context(pyro.validation_enabled(False))
            steppers = self._steppers()
            schedulers = [
                get_scheduler(
                    options.schedule,
                    optimizer,
                    num_warmup_steps=int(options.warmup * self.steps),
                    num_training_steps=self.steps,
                )
                for optimizer in steppers
            ]
            bad = 0
            best: tuple[float, int, dict[str, Tensor]] | None = None
            best_rows = torch.zeros(0)  # held-out NLLs of that state, row by row
            for step in range(1, self.steps + 1):
                report.steps = step
                bar.update()
                entry = self._step(step, steppers)
                if entry is None:
                    if report.skipped == 0 and self.feed.features is None:
                        check_all(self.model, data=self.feed.examples)
                    report.skipped += 1
                    bad += 1
                    if bad >= _MAX_SKIPPED:
                        where = culprit(self.guide, self.elbo.parts)
                        self._restore(self.good)
                        raise FitError(
                            f"the loss was not finite for {bad} steps in a row (last step: {step} "
                            f"of {self.steps}), first at {where}; the last good state is kept"
                        )
                    continue
                bad = 0
                report.history.append(entry)
                bar.set_postfix(
                    loss=f"{entry['loss']:.3f}",
                    NLL=f"{entry['nll']:.3f}",
                    KL=f"{entry['kl']:.3f}",
                    refresh=False,
                )
                for scheduler in schedulers:
                    scheduler.step()
                last = self.selects and step == self.steps
                if self.validation is not None and (last or step % self.eval_every == 0):
                    rows = self._evaluate()
                    entry["validation_nll"] = nll = rows.mean().item()
                    if not math.isfinite(nll):
                        continue
                    if not (self.selects or options.patience):  # looked at, and no more
                        continue
                    if best is None or nll < best[0]:
                        best, best_rows = (nll, step, self._state()), rows
                    elif self.selects:
                        if last and not _worse(rows, best_rows):
                            best = (nll, step, self._state())
                    elif step - best[1] >= (options.patience or 0) * self.eval_every:
                        break
            if not report.history:
                raise FitError(
                    f"the loss was not finite at any of {self.steps} steps, first at "
                    f"{culprit(self.guide, self.elbo.parts)}; the guide is where it started"
                )
            if best is not None:
                report.best_step = best[1]
                self._restore(best[2])
            if self.selects:
                self._settle_noise()
            with torch.no_grad():  # the state that is kept need not be that of the last step
                self.loss(next(self.batches).to(self.model.network.device))
            assert self.elbo.parts is not None
            self.watch.summarise(self.model, self.elbo.parts, report)
        report.seconds = time.monotonic() - started

    def _state(self) -> dict[str, Tensor]:
        values = self.guide.state_dict().items()
        return {name: value.detach().clone() for name, value in values}

    def _restore(self, state: dict[str, Tensor]) -> None:
        self.guide.load_state_dict(state)

    def _endless(self, particles: int) -> Iterator[Batch]:
        while True:
            yield from self.feed.training(self.options.batch_size, particles, self.generator)

    def _prepare(self) -> None:
        """Let lazy guides create their parameters, and see that guide and model fit together."""
        device = self.model.network.device
        _, whole = next(iter(self.feed.prediction(self.options.batch_size)))
        with torch.no_grad():
            # Pyro's guides learn the shapes of the latents from a first call without particles.
            self.guide(whole.to(device))
            batch = next(self.batches)
            self.batches = chain([batch], self.batches)  # it is still to be learnt from
            self.loss(batch.to(device))
        self.good = self._state()

    def _steppers(self) -> list[Optimizer]:
        if self.optimizer is not None:
            return [self.optimizer(trained(self.guide))]
        return optimizers(self.guide, self.options, len(self.feed.examples))

    def _step(self, step: int, steppers: list[Optimizer]) -> dict[str, float] | None:
        """One optimiser step; None if loss or gradient were not finite and it was skipped."""
        options, device = self.options, self.model.network.device
        size = len(self.feed.examples)
        rise = step / (options.kl_warmup * self.steps) if options.kl_warmup else 1.0
        self.elbo.temperature = self.temperature * min(1.0, rise)
        for optimizer in steppers:
            optimizer.zero_grad()
        loss = nll = kl = 0.0
        for _ in range(options.accumulate):
            batch = next(self.batches).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                value = self.loss(batch) / options.accumulate
            if not torch.isfinite(value):
                return None
            value.backward()
            if step == 1 and isinstance(self.guide, FunctionGuide):
                self.guide.check_trained()
            assert self.elbo.parts is not None
            loss += value.item()
            nll += self.elbo.parts.nll.item() / options.accumulate
            kl += sum(v.item() for v in self.elbo.parts.kl.values()) / options.accumulate
        params = [p for p in self.guide.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if not torch.isfinite(norm):
            return None
        if step % 10 == 1:
            self.good = self._state()
        self.watch.slopes(step)
        if options.clip is not None:
            nn.utils.clip_grads_with_norm_(params, options.clip * size, norm)
        lr = steppers[0].param_groups[0]["lr"]
        for optimizer in steppers:
            optimizer.step()
        return {
            "step": step,
            "loss": loss / size,
            "nll": nll / size,
            "kl": kl / size,
            "draws": 0 if self.point else self.particles,
            "temperature": self.elbo.temperature,
            "lr": lr,
            "gradient": norm.item() / size,
        }

    def _evaluate(self) -> Tensor:
        """(N,) NLLs of the validation rows; of a point of ratings with the noise that suits them,
        as what it has learnt by heart leaves no noise in the training rows."""
        assert self.validation is not None
        samples = 0 if self.point else self.options.eval_samples
        forecast = predict(self.model, self.guide, self.validation, samples, bf16=self.options.bf16)
        if self.point and self.model.likelihood.constant_noise:
            assert isinstance(forecast, RatingForecast)
            square = (forecast.mean - forecast.observed()).double().square()
            return 0.5 * (square / square.mean() + (2 * math.pi * square.mean()).log())
        return nlls(forecast)

    def _settle_noise(self) -> None:
        """A point's noise scale of ratings at the held-out rows' errors."""
        likelihood = self.model.likelihood
        if not likelihood.constant_noise or "noise.log_scale" not in self.guide.means():  # type: ignore[operator]
            return
        assert isinstance(self.guide, Guide) and self.validation is not None
        forecast = predict(self.model, self.guide, self.validation, 0, bf16=self.options.bf16)
        assert isinstance(forecast, RatingForecast)
        square = (forecast.mean - forecast.observed()).double().square().mean()
        noise = (square.sqrt() / likelihood.unit).log()
        self.guide.move({"noise.log_scale": noise.to(torch.float32)})


def _worse(rows: Tensor, best: Tensor) -> bool:
    """Whether NLLs are higher than the best ones by more than two standard errors of the
    difference.

    The last state has had the smallest steps, and one of ten that looks a little better on a
    hundred rows seldom is.
    """
    away = rows - best
    return bool(away.mean() > 2 * away.std() / len(away) ** 0.5)


def as_module(guide: object) -> nn.Module:
    """A guide as a module: itself, or a hand-written function wrapped up."""
    if isinstance(guide, nn.Module):
        return guide
    if callable(guide):
        return FunctionGuide(guide)
    raise ConfigError(f"guide: expected a guide's name, a module or a function, got {guide!r}")
