"""Stochastic variational inference: the loop over steps, with a torch optimiser."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from itertools import chain, islice

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..batch import Batch
from ..data import Examples
from ..errors import ConfigError, FitError
from ..guides import DeltaGuide, FunctionGuide, Guide, LowRankGuide
from ..guides.guide import blocks_of
from ..linear import LinearModel
from ..metrics import evaluate
from ..model import Model
from .calm import AtMean
from .curvature import narrowed
from .draws import seeded
from .elbo import ELBO
from .feed import Feed
from .joint import WhitenedAdam
from .predict import predict
from .report import FitReport
from .scale import PriorScale
from .steps import optimizers, trained
from .threads import let_others, sampling
from .watch import Watch, culprit

__all__ = ["OptimizerFactory", "as_module", "optimise"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
State = tuple[dict[str, Tensor], float]  # of the guide; the factor of the prior's scale

# Where nothing else is drawn, low-rank guides' means take this share of the steps without noise. In
# the rest their covariances are measured so many times, but some steps apart, each on so many
# examples; the last few measurements count alike. The scale of the prior needs some earlier, at
# these shares of the steps without noise.
_CALM, _MEASUREMENTS, _APART, _MEASURED, _LEAST_SHARE = 0.6, 6, 4, 128, 0.2
_GLANCES = 0.5, 0.8


def optimise(
    model: Model,
    guide: nn.Module,
    data: Examples | Feed,
    validation: Examples | None,
    report: FitReport,
    optimizer: OptimizerFactory | None = None,
    scale: PriorScale | None = None,
) -> None:
    """Fit the guide's parameters in place, as `report.options` say, and fill in the report.

    Args:
        scale: moved as well, whenever the covariance is measured; to be settled by the caller.

    Raises:
        FitError: the loss was not finite for `options.max_skipped` steps in a row; the guide is
            left in its last good state.
    """
    feed = data if isinstance(data, Feed) else Feed(model, data)
    _Run(model, guide, feed, validation, report, optimizer, scale).run()


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
        scale: PriorScale | None,
    ) -> None:
        self.model, self.guide, self.report, self.scale = model, guide, report, scale
        self.options = options = report.options
        self.blocks = blocks_of(guide)
        self.point = all(isinstance(block, DeltaGuide) for block in self.blocks)
        self.particles = 1 if self.point else options.particles
        self.feed = feed
        self.validation = None if validation is None else Feed(model, validation)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.batches: Iterator[Batch] = self._endless(self.particles)
        self._whole = self._endless(1)
        per_epoch = -(-len(feed.examples) // (options.batch_size * options.accumulate))
        self.steps = options.max_steps or options.epochs * per_epoch
        self.eval_every = options.eval_every or min(per_epoch, self.steps)
        self.elbo = ELBO(self.particles, options.temperature)
        # What the loss is of; predictions linearise by themselves, at less cost.
        self.fitted = model
        if isinstance(guide, Guide) and guide.linear:
            self.fitted = LinearModel(model, guide.means)
        self.loss: ELBOModule = self.elbo(self.fitted, guide)
        self.joint = [block for block in self.blocks if isinstance(block, LowRankGuide)]
        if self.joint and options.temperature == 0:
            raise ConfigError(
                "temperature=0 is maximum likelihood, under which a joint guide has no covariance; "
                "expected more than 0, or a 'delta' guide"
            )
        # Without noise the linearised network is the network.
        self.calm_loss: ELBOModule = self.elbo(model, guide)
        still = all(isinstance(block, LowRankGuide | DeltaGuide) for block in self.blocks)
        self.calm = int(_CALM * self.steps) if self.joint and still else 0
        self.optimizer = optimizer
        self.good: State = ({}, 1.0)  # the last one known to have a finite loss and gradient
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
            best: tuple[float, int, State] | None = None
            for step in range(1, self.steps + 1):
                report.steps = step
                bar.update()
                let_others()
                self._measure(step, steppers)
                entry = self._step(step, steppers)
                if entry is None:
                    report.skipped += 1
                    bad += 1
                    if bad >= options.max_skipped:
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
                if self.validation is not None and step % self.eval_every == 0:
                    entry["validation_nll"] = nll = self._evaluate()
                    if step <= self.calm:  # there is no covariance yet: nothing to go back to
                        continue
                    if not math.isfinite(nll):
                        continue
                    if not options.patience:  # looked at, and no more
                        continue
                    if best is None or nll < best[0]:
                        best = (nll, step, self._state())
                    elif step - best[1] >= options.patience * self.eval_every:
                        break
            if not report.history:
                raise FitError(
                    f"the loss was not finite at any of {self.steps} steps, first at "
                    f"{culprit(self.guide, self.elbo.parts)}; the guide is where it started"
                )
            if best is not None:
                report.best_step = best[1]
                self._restore(best[2])
            self._noisy(True)
            with torch.no_grad():  # the state that is kept need not be that of the last step
                self.loss(next(self.batches).to(self.model.network.device))
            assert self.elbo.parts is not None
            self.watch.summarise(self.model, self.elbo.parts, report)
        report.seconds = time.monotonic() - started

    def _state(self) -> State:
        values = self.guide.state_dict().items()
        copied = {name: value.detach().clone() for name, value in values}
        return copied, self.scale.coordinates.gain if self.scale else 1.0

    def _restore(self, state: State) -> None:
        self.guide.load_state_dict(state[0])
        if self.scale:
            self.scale.coordinates.gain = state[1]

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

    def _measure(self, step: int, steppers: Sequence[Optimizer]) -> None:
        """Measure the covariances of low-rank guides, at steps spread evenly over those with noise,
        and move the scale of the prior, if that is sought, now and at some steps before."""
        options = self.options
        calm, done = step <= self.calm, step - 1 - self.calm
        every = max(-(-(self.steps - self.calm) // _MEASUREMENTS), _APART)
        glances = [int(share * self.calm) for share in _GLANCES if self.scale]
        if not self.joint or (step not in glances if calm else done % every):
            return
        assert isinstance(self.guide, Guide)
        device = self.model.network.device
        count = -(-min(_MEASURED, len(self.feed.examples)) // options.batch_size)
        batches = [batch.to(device) for batch in islice(self._whole, count)]
        for block in self.joint:
            with AtMean() if calm else nullcontext():
                measured = narrowed(
                    self.model if calm else self.fitted,
                    self.guide,
                    block,
                    batches,
                    len(self.feed.examples) / options.temperature,
                    1.0 if calm else max(1 / (1 + done // every), _LEAST_SHARE),
                )
            if not measured.is_finite():  # as a step that is skipped: the next may be better
                self.report.skipped += 1
                return
            block.covariance = measured
            del measured  # the scale's step makes another, and this one is large
            if not calm:
                self.watch.widths(block)
        if self.scale:
            self.scale.step()
            for stepper in steppers:
                if isinstance(stepper, WhitenedAdam):
                    stepper.follow()

    def _step(self, step: int, steppers: list[Optimizer]) -> dict[str, float] | None:
        """One optimiser step; None if loss or gradient were not finite and it was skipped."""
        options, device = self.options, self.model.network.device
        size = len(self.feed.examples)
        rise = step / (options.kl_warmup * self.steps) if options.kl_warmup else 1.0
        self.elbo.temperature = options.temperature * min(1.0, rise)
        self._noisy(step > self.calm)
        loss_of, batches = (
            (self.loss, self.batches) if self.elbo.noise else (self.calm_loss, self._whole)
        )
        for optimizer in steppers:
            optimizer.zero_grad()
        loss = nll = kl = 0.0
        for _ in range(options.accumulate):
            batch = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                value = loss_of(batch) / options.accumulate
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
            "draws": self.elbo.num_particles if self.elbo.noise and not self.point else 0,
            "temperature": self.elbo.temperature,
            "lr": lr,
            "gradient": norm.item() / size,
        }

    def _noisy(self, noise: bool) -> None:
        self.elbo.noise = noise
        self.elbo.num_particles = self.particles if noise else 1

    def _evaluate(self) -> float:
        assert self.validation is not None
        samples = self.options.eval_samples if self.elbo.noise and not self.point else 0
        forecast = predict(self.model, self.guide, self.validation, samples, bf16=self.options.bf16)
        return evaluate(forecast)["nll"]


def as_module(guide: object) -> nn.Module:
    """A guide as a module: itself, or a hand-written function wrapped up."""
    if isinstance(guide, nn.Module):
        return guide
    if callable(guide):
        return FunctionGuide(guide)
    raise ConfigError(f"guide: expected a guide's name, a module or a function, got {guide!r}")
