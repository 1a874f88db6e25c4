"""Stochastic variational inference: the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import chain

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
from ..guides.earlier import Earlier
from ..guides.guide import check_no_others, trained
from ..model.cached_batches import CachedBatches, check_all
from ..model.model import Model
from ..prediction.predict import predict
from .convergence import Descent, culprit, mean_kl, note_end
from .earlier_labels import with_earlier_texts
from .early_stopping import EarlyStopping, copied
from .elbo import ELBO
from .estimated_noise import has_noise, noise_of, pool_noise, settle_noise
from .report import FitReport

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
"""From parameters to a torch optimiser of them."""
Callback = Callable[[dict[str, float]], object]
"""Gets a copy of each step's entry of `FitReport.history`."""

_MAX_SKIPPED = 5  # consecutive steps without a finite loss, after which a fit stops
_WARM_UP = 0.05  # of the steps, in which the learning rate rises
_FEWEST = 50  # held-out rows to choose the state: fewer choose by chance, so the fit is brief
_CHECKS = 10  # evaluations of a point estimate whose state held-out rows choose
_PATIENCE = 3  # of these, without a better state, after which it stops
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
    def examples(self) -> Examples:
        """The rows of the data."""
        return self.data.examples if isinstance(self.data, CachedBatches) else self.data

    @property
    def pools_noise(self) -> bool:
        """Whether the noise scale of ratings is pooled with that of earlier rounds."""
        later = self.earlier is not None and self.held_out is None and self.options.default_length
        return later and has_noise(self.guide, self.model)


def optimise(setup: Setup, report: FitReport) -> None:
    """Fit the guide's parameters, and fill in the report, in place.

    Raises:
        FitError: the loss was not finite for five steps in a row, or at the end; the guide is in
            its last good state.
    """
    _Run(setup, report).run()


class _Run:
    """The state of one fit."""

    def __init__(self, setup: Setup, report: FitReport) -> None:
        self.setup, self.guide, self.options = setup, setup.guide, setup.options
        self.report = report
        model, data, later = setup.model, setup.data, setup.earlier is not None
        examples = setup.examples
        learnt, self.labels = with_earlier_texts(setup.earlier, examples)
        self.feed = data if isinstance(data, CachedBatches) else CachedBatches(model, learnt)
        self.size = len(examples)
        self.validation = None if setup.held_out is None else CachedBatches(model, setup.held_out)
        self.model, weight, self.least = self.guide.objective(model, setup.temperature, later)
        self.particles = 1 if self.guide.point else self.options.particles
        self.elbo = ELBO(self.particles, weight)
        self.loss: ELBOModule = self.elbo(self.model, self.guide)
        self.generator = torch.Generator().manual_seed(self.options.seed)
        self.batches: Iterator[Batch] = self._endless()
        self._choose_length()
        self.good: dict[str, Tensor] = {}  # the last state with a finite loss and gradient
        self.descent = Descent(self.steps)

    def _choose_length(self) -> None:
        """How many steps there are, and whether held-out rows choose the state of a point."""
        setup, options, point = self.setup, self.options, self.guide.point
        rows = 0 if setup.held_out is None else len(setup.held_out)
        later = setup.earlier is not None
        free = point and options.temperature is None and setup.temperature == 0 and not later
        self.settles = free and rows > 0
        ratings = setup.model.likelihood.kind == "rating"
        # A head alone does not overfit so soon.
        tuned = self.settles and bool(setup.model.network.kinds)
        unchosen = (later and point) or (tuned and rows < _FEWEST)
        per_epoch = -(-len(self.feed.examples) // options.batch_size)
        self.steps = options.steps(per_epoch, brief=unchosen or (tuned and not ratings))
        # Such a fit is short on purpose: its loss still falls.
        self.ends_early = unchosen and options.default_length
        self.selects = self.settles and not self.ends_early
        if self.selects:
            every = max(1, self.steps // _CHECKS)
            # Probabilities of later states are too certain, while the noise scale of ratings suits
            # the held-out rows at any state.
            patience = self.steps if ratings else _PATIENCE
            self.stopping = EarlyStopping(self.guide, every, patience, last=self.steps)
        else:
            every = min(per_epoch, self.steps)
            self.stopping = EarlyStopping(self.guide, every, options.patience)

    def run(self) -> None:
        with (
            seeded(self.options.seed),
            own_parameters(),
            self.labels or nullcontext(),
            bars(self.options.progress),
            work("training", self.steps) as bar,
        ):
            self._prepare()
            before = self._noise()
            # Argument checks have passed once; in the loop, non-finite values are handled.
            with pyro.validation_enabled(False):
                self._train(bar)
                best_step = self.stopping.restore()
                self._settle(before)
                self._note_end(best_step)

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

    def _endless(self) -> Iterator[Batch]:
        while True:
            size = self.options.batch_size
            yield from self.feed.training(size, self.particles, self.generator)

    def _noise(self) -> tuple[Tensor, Tensor] | None:
        """The logarithms of the noise scale of ratings as it is, and as it suits these rows; in a
        later round that pools them."""
        if not self.setup.pools_noise:
            return None
        last = self.model.likelihood.log_noise(self.guide.means()).detach().clone()
        return last, noise_of(self.model, self.guide, self.feed, self.options.bf16)[1]

    def _settle(self, before: tuple[Tensor, Tensor] | None) -> None:
        """Go back a part of the way in a later round of a point, and set its noise of ratings."""
        earlier, bf16 = self.setup.earlier, self.options.bf16
        model, guide, later = self.model, self.guide, earlier is not None
        if earlier is not None and self.ends_early:
            guide.average(earlier.step(self.size))
            if before is not None:
                last, first = before
                here = first, noise_of(model, guide, self.feed, bf16)[1]
                pool_noise(model, guide, last, here, earlier.share(self.size))
        if not has_noise(guide, model):
            return
        if self.validation is not None and (self.settles or (later and self.ends_early)):
            settle_noise(model, guide, self.validation, bf16)
        elif self.validation is None and not later:  # a few rows and steps
            settle_noise(model, guide, self.feed, bf16, learnt=True)

    def _note_end(self, best_step: int | None) -> None:
        assert self.elbo.parts is not None
        batch = next(self.batches).to(self.model.network.device)
        # Anew, as the state that is kept may be an earlier one.
        kl = mean_kl(self.guide, self.model, batch, self.particles)
        self.elbo.parts = self.elbo.parts._replace(kl=kl)
        if not all(value.isfinite() for value in kl.values()):
            raise self._diverged("at the end")
        self.report.best_step = best_step
        free = best_step is None and not self.ends_early
        self.report.falling = free and self.descent.goes_on()
        note_end(self.report, self.guide, self.model, kl)

    def _train(self, bar: Work) -> None:
        steppers = self._steppers()
        schedulers = [LambdaLR(stepper, partial(_rate, steps=self.steps)) for stepper in steppers]
        bad, note = 0, ""  # steps in a row; the held-out NLL
        for step in range(1, self.steps + 1):
            self.report.steps = step
            entry = self._step(step, steppers)
            if entry is None:
                bad += 1
                self._skip(step, bad)
                bar.next()
                continue
            bad = 0
            self.report.history.append(entry)
            for scheduler in schedulers:
                scheduler.step()
            ends = self._ends(step, entry)
            if "validation_nll" in entry:
                note = f", held-out NLL {entry['validation_nll']:.3f}"
            bar.next(f"loss {entry['loss']:.3f}{note}")
            if self.setup.callback is not None:
                self.setup.callback({**entry})
            if ends:
                break
        if not self.report.history:
            raise FitError(
                f"the loss was not finite at any of {self.steps} steps, first at "
                f"{culprit(self.guide, self.elbo.parts)}; the guide has its initial values"
            )

    def _steppers(self) -> list[Optimizer]:
        if self.setup.optimizer is not None:
            return [self.setup.optimizer(trained(self.guide))]
        return self.guide.optimizers(self.options, len(self.feed.examples))

    def _step(self, step: int, steppers: Sequence[Optimizer]) -> dict[str, float] | None:
        """One optimiser step; None if it was skipped: the loss or gradient was not finite."""
        for optimizer in steppers:
            optimizer.zero_grad()
        self._backward(step)
        params = [p for p in self.guide.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        lr = steppers[0].param_groups[0]["lr"]
        loss = {"step": step, **self._loss_parts()}
        if not (math.isfinite(loss["loss"]) and norm.isfinite()):
            return None
        if step % 10 == 1:
            self.good = copied(self.guide.state_dict())
        # Where held-out rows choose the state, the loss of the training rows is no measure.
        with nullcontext() if self.selects else self.descent.step(params, lr, self.size):
            for optimizer in steppers:
                optimizer.step()
        return {**loss, "lr": lr, "gradient": norm.item() / self.size}

    def _backward(self, step: int) -> None:
        """The gradients of the loss of the next batch."""
        device = self.model.network.device
        batch = next(self.batches).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.options.bf16):
            value = self.loss(batch)
        if step == 1:
            check_no_others(value, self.guide)
        value.backward()
        if step == 1:
            self.guide.check_trained()

    def _loss_parts(self) -> dict[str, float]:
        """What the history has of the last loss, in nats per example."""
        assert self.elbo.parts is not None
        nll, evidence = self.elbo.parts.nll.item(), self.elbo.parts.evidence.item()
        kl = sum(value.item() for value in self.elbo.parts.kl.values()) - self.least
        temperature = self.elbo.temperature
        return {
            "loss": (nll + temperature * kl + evidence) / self.size,
            "nll": nll / self.size,
            "kl": (kl + evidence / temperature if temperature else kl) / self.size,
            "draws": 0 if self.guide.point else self.particles,
            "temperature": temperature,
        }

    def _skip(self, step: int, bad: int) -> None:
        """Count a skipped step, the last of so many in a row; it may be one too many."""
        if self.report.skipped == 0 and self.feed.features is None:
            check_all(self.model, data=self.feed.examples)
        self.report.skipped += 1
        if bad >= _MAX_SKIPPED:
            raise self._diverged(f"for {bad} steps in a row (last step: {step} of {self.steps})")

    def _diverged(self, when: str) -> FitError:
        """The error, with the guide in its last good state."""
        where = culprit(self.guide, self.elbo.parts)
        self.guide.load_state_dict(self.good)
        return FitError(
            f"the loss was not finite {when}, first at {where}; the last good state is kept"
        )

    def _ends(self, step: int, entry: dict[str, float]) -> bool:
        """Evaluate the held-out rows, if that is due; whether the fit ends here."""
        if self.validation is None or not self.stopping.is_due(step):
            return False
        try:
            with bars(False):  # one step's part, whose title stays
                rows = self._evaluate()
        except DataError as error:
            if error.rows:
                raise
            return False  # the guide has diverged, which the next steps find, or one draw was far
        entry["validation_nll"] = rows.mean().item()
        return self.stopping.ends(step, rows)

    def _evaluate(self) -> Tensor:
        """(N,) NLLs of the validation rows; for a point estimate of ratings, with the noise scale
        that suits these rows (`training.estimated_noise`)."""
        assert self.validation is not None
        bf16 = self.options.bf16
        if has_noise(self.guide, self.model):
            return noise_of(self.model, self.guide, self.validation, bf16)[0]
        samples = 0 if self.guide.point else _EVALUATION_DRAWS
        return predict(self.model, self.guide, self.validation, samples, bf16=bf16).nlls()


def _rate(done: int, steps: int) -> float:
    """The share of the learning rate that is used after `done` of the steps."""
    rise = int(_WARM_UP * steps)
    if done < rise:
        return (done + 1) / (rise + 1)
    progress = (done - rise) / (steps - rise)
    return 0.5 * (1 + math.cos(math.pi * progress))
