"""Stochastic variational inference: the loop over steps, with a torch optimiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..batch import Batch
from ..data import Examples
from ..errors import ConfigError, FitError, GuideError
from ..guides import DeltaGuide, FunctionGuide, Guide, NormalGuide, latents
from ..metrics import evaluate
from ..model import Model
from .elbo import ELBO
from .feed import Feed
from .natural import NaturalGradient
from .options import FitOptions
from .predict import predict
from .report import FitReport, drift

__all__ = ["OptimizerFactory", "as_module", "optimise"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
State = dict[str, Tensor]


def optimise(
    model: Model,
    guide: nn.Module,
    examples: Examples,
    validation: Examples | None,
    options: FitOptions,
    optimizer: OptimizerFactory | None = None,
) -> FitReport:
    """Fit the guide's parameters in place.

    Raises:
        FitError: the loss was not finite for `options.max_skipped` steps in a row; the guide is
            left in its last good state.
    """
    return _Run(model, guide, examples, validation, options, optimizer).run()


class _Run:
    """The state of one fit."""

    def __init__(
        self,
        model: Model,
        guide: nn.Module,
        examples: Examples,
        validation: Examples | None,
        options: FitOptions,
        optimizer: OptimizerFactory | None,
    ) -> None:
        self.model, self.guide, self.options = model, guide, options
        self.particles = 1 if isinstance(guide, DeltaGuide) else options.particles
        self.feed = Feed(model, examples)
        self.validation = None if validation is None else Feed(model, validation)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.batches = self._endless()
        per_epoch = -(-len(examples) // (options.batch_size * options.accumulate))
        self.steps = options.max_steps or options.epochs * per_epoch
        self.eval_every = options.eval_every or per_epoch
        self.elbo = ELBO(self.particles, options.temperature)
        self.loss: ELBOModule = self.elbo(model, guide)
        self.report = FitReport(len(examples), examples.fingerprint, options)
        self.optimizer = optimizer

    def run(self) -> FitReport:
        options, report = self.options, self.report
        started = time.monotonic()
        devices = range(torch.cuda.device_count())
        with (
            torch.random.fork_rng(devices),
            pyro.get_param_store().scope(),
            ExitStack() as checks,
            tqdm(total=self.steps, disable=not options.progress, desc="fit", unit="step") as bar,
        ):
            torch.manual_seed(options.seed)
            self._prepare()
            # Argument checks have passed once; in the loop a NaN is ours to handle.
            checks.enter_context(pyro.validation_enabled(False))
            optimizers = self._optimizers()
            schedulers = [
                get_scheduler(
                    options.schedule,
                    optimizer,
                    num_warmup_steps=int(options.warmup * self.steps),
                    num_training_steps=self.steps,
                )
                for optimizer in optimizers
            ]
            good, bad = _copy(self.guide), 0
            best: tuple[float, int, State] | None = None
            before: dict[str, Tensor] = {}
            for step in range(1, self.steps + 1):
                entry = self._step(step, optimizers)
                if entry is None:
                    report.skipped += 1
                    bad += 1
                    if bad >= options.max_skipped:
                        culprit = self._culprit()
                        self.guide.load_state_dict(good)
                        raise FitError(
                            f"the loss was not finite for {bad} steps in a row (last step: {step} "
                            f"of {self.steps}), first at {culprit}; the last good state is kept"
                        )
                else:
                    bad = 0
                    report.history.append(entry)
                    bar.set_postfix(
                        ELBO=f"{-entry['loss']:.3f}",
                        NLL=f"{entry['nll']:.3f}",
                        KL=f"{entry['kl']:.3f}",
                        refresh=False,
                    )
                for scheduler in schedulers:
                    scheduler.step()
                bar.update()
                report.steps = step
                if entry is not None and step % 10 == 0:
                    good = _copy(self.guide)
                if step == self.steps * 3 // 4 and isinstance(self.guide, NormalGuide):
                    before = self.guide.scales()
                if self.validation is not None and step % self.eval_every == 0:
                    nll = self._evaluate()
                    report.history[-1]["validation_nll"] = nll
                    if best is None or nll < best[0]:
                        best = (nll, step, _copy(self.guide))
                    elif options.patience and step - best[1] >= options.patience * self.eval_every:
                        break
            if options.patience and best is not None:
                report.best_step = best[1]
                self.guide.load_state_dict(best[2])
            self._summarise(before)
        report.seconds = time.monotonic() - started
        return report

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.feed.training(self.options.batch_size, self.particles, self.generator)

    def _prepare(self) -> None:
        """Let lazy guides create their parameters, and see that guide and model fit together."""
        batch = next(self.batches).to(self.model.network.device)
        with torch.no_grad():
            self.loss(batch)

    def _optimizers(self) -> list[Optimizer]:
        params = [p for p in self.guide.parameters() if p.requires_grad]
        if not params:
            raise GuideError("the guide has no parameters to fit")
        if self.optimizer is not None:
            return [self.optimizer(params)]
        pairs = self.guide.natural_pairs() if isinstance(self.guide, Guide) else []
        natural = {id(tensor) for pair in pairs for tensor in pair}
        rest = [p for p in params if id(p) not in natural]
        optimizers: list[Optimizer] = []
        if pairs:
            optimizers.append(NaturalGradient(pairs, lr=self.options.natural_lr))
        if rest:
            optimizers.append(Adam(rest, lr=self.options.lr))
        return optimizers

    def _step(self, step: int, optimizers: list[Optimizer]) -> dict[str, float] | None:
        """One optimiser step; None if loss or gradient were not finite and it was skipped."""
        options, device = self.options, self.model.network.device
        size = len(self.feed.examples)
        rise = step / (options.kl_warmup * self.steps) if options.kl_warmup else 1.0
        self.elbo.temperature = options.temperature * min(1.0, rise)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = nll = kl = 0.0
        for _ in range(options.accumulate):
            batch = next(self.batches).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                value = self.loss(batch) / options.accumulate
            if not torch.isfinite(value):
                return None
            value.backward()
            assert self.elbo.parts is not None
            loss += value.item()
            nll += self.elbo.parts.nll.item() / options.accumulate
            kl += sum(v.item() for v in self.elbo.parts.kl.values()) / options.accumulate
        params = [p for p in self.guide.parameters() if p.requires_grad]
        bound = float("inf") if options.clip is None else options.clip * size
        norm = nn.utils.clip_grad_norm_(params, bound)
        if not torch.isfinite(norm):
            return None
        lr = optimizers[0].param_groups[0]["lr"]
        for optimizer in optimizers:
            optimizer.step()
        return {
            "step": step,
            "loss": loss / size,
            "nll": nll / size,
            "kl": kl / size,
            "lr": lr,
            "gradient": norm.item() / size,
        }

    def _evaluate(self) -> float:
        assert self.validation is not None
        samples = 0 if self.particles == 1 else self.options.eval_samples
        forecast = predict(
            self.model, self.guide, self.validation, samples, bf16=self.options.bf16
        )
        return evaluate(forecast)["nll"]

    def _culprit(self) -> str:
        """Where the first value that is not finite is."""
        for name, parameter in self.guide.named_parameters():
            if not parameter.isfinite().all():
                return f"the guide's {name}"
        parts = self.elbo.parts
        if parts is not None:
            for name, kl in parts.kl.items():
                if not kl.isfinite():
                    return f"the KL of site {name!r}"
            if not parts.nll.isfinite():
                return "the likelihood (site 'label')"
        for name, parameter in self.guide.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of the guide's {name}"
        return "the loss"

    def _summarise(self, before: dict[str, Tensor]) -> None:
        parts = self.elbo.parts
        assert parts is not None
        self.report.kl = {name: value.item() for name, value in parts.kl.items()}
        if isinstance(self.guide, NormalGuide):
            after = self.guide.scales()
            prior = {latent.name: latent.scale for latent in latents(self.model)}
            self.report.scales = {
                name: (after[name] / prior[name]).log().mean().exp().item() for name in after
            }
            if before:
                self.report.unsettled = drift(before, after)


def _copy(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def as_module(guide: object) -> nn.Module:
    """A guide as a module: itself, or a hand-written function wrapped up."""
    if isinstance(guide, nn.Module):
        return guide
    if callable(guide):
        return FunctionGuide(guide)
    raise ConfigError(f"guide: expected a guide's name, a module or a function, got {guide!r}")
