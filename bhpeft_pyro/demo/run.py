"""The demonstration from data to files, step by step."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import presets
from ..forecast import ClassForecast
from ..posterior import Posterior
from . import figures, steps
from .data import Round
from .steps import Settings
from .story import Story
from .verdict import Comparison, compare, summary

__all__ = ["STEPS", "run"]

STEPS = 6

Tests = dict[str, ClassForecast]

HEAD, POINT, SCALED, BAYES = (
    "Bayesian head only",
    "deterministic hybrid",
    "deterministic + T",
    "Bayesian hybrid",
)


def run(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rounds: tuple[Round, Round],
    settings: Settings,
    out: Path,
    story: Story,
) -> dict[str, Any]:
    """Fit, compare, update, save; returns what `results.json` holds.

    Args:
        backbone, tokenizer: the frozen transformer.
        rounds: what is learnt first, and what comes later.
        settings: sizes.
        out: the folder for all that is written.
        story: what prints.
    """
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "rounds": [str(each) for each in rounds],
        "seconds": story.seconds,
    }
    fitted = _fit(backbone, tokenizer, rounds[0], settings, story)
    tests = _test(fitted, rounds[0], settings, story, results)
    _doubt(tests, story, results)
    after = _update(fitted, rounds, tests, settings, story, results)
    compared = _compare(tests, after["forecasts"], rounds)
    results["comparisons"] = [asdict(each) for each in compared]
    _save(fitted[BAYES], after["posterior"], rounds, tests, settings, out, story)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    _conclude(compared, rounds, out, story)
    return results


def _fit(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    first: Round,
    settings: Settings,
    story: Story,
) -> dict[str, Posterior]:
    with story.step(
        "Fit the deterministic hybrid (LoRA + adapter + prefix)",
        "The rival: ordinary fine-tuning; the validation rows choose the step that is kept.",
    ):
        head, point = (
            steps.deterministic(backbone, tokenizer, kinds, first, settings, story.bars)
            for kinds in (presets.head_only(), presets.bh_peft())
        )
        story.say(f"{point.report.steps} steps; step {point.report.best_step} is kept")
    with story.step(
        "Measure how sure it can be: the Bayesian hybrid",
        "A Laplace approximation around that very point: a width for all weights, no step more.",
    ):
        head, bayes = (steps.bayesian(each, first) for each in (head, point))
        story.say(str(bayes.report))
    return {HEAD: head, POINT: point, BAYES: bayes}


def _test(
    fitted: dict[str, Posterior],
    first: Round,
    settings: Settings,
    story: Story,
    results: dict[str, Any],
) -> Tests:
    with story.step(
        f"Compare them on {len(first.test)} {first.name} test sentences",
        "NLL and ECE say whether the probabilities can be trusted; lower is better.",
    ):
        tests = {name: steps.forecast(it, first.test, settings) for name, it in fitted.items()}
        scaled, temperature = steps.tempered(fitted[POINT], first, tests[POINT], settings)
        tests = {HEAD: tests[HEAD], POINT: tests[POINT], SCALED: scaled, BAYES: tests[BAYES]}
        quality = {name: steps.scores(test) for name, test in tests.items()}
        story.table(
            f"T = {temperature:.2f} is the temperature fitted on the validation rows",
            ("", "accuracy", "NLL", "ECE", "Brier"),
            [(name, *scores.values()) for name, scores in quality.items()],
        )
    results |= {"quality": quality, "temperature_scaling": temperature}
    return tests


def _doubt(tests: Tests, story: Story, results: dict[str, Any]) -> None:
    with story.step(
        "Ask it what it does not know",
        "Epistemic uncertainty: what the weights leave open (mutual information).",
    ):
        uncertain = steps.most_uncertain(tests[BAYES])
        for each in uncertain:
            right = "right" if each["prediction"] == each["truth"] else "wrong"
            story.say(
                f"{each['epistemic']:.3f} nats: predicted {each['prediction']} "
                f"({each['confidence']:.2f}), which is {right}"
            )
            story.say(f"    {each['text']}")
        rejected = {
            "deterministic, by confidence": steps.rejections(tests[POINT], "confidence"),
            "Bayesian, by confidence": steps.rejections(tests[BAYES], "confidence"),
            "Bayesian, by epistemic": steps.rejections(tests[BAYES], "epistemic"),
        }
        story.table(
            "Accuracy of the rest when the least certain are rejected (left to a human)",
            ("rejected:", *rejected["Bayesian, by epistemic"]),
            [(name, *values.values()) for name, values in rejected.items()],
        )
    results |= {"most_uncertain": uncertain, "rejection": rejected}


def _update(
    fitted: dict[str, Posterior],
    rounds: tuple[Round, Round],
    tests: Tests,
    settings: Settings,
    story: Story,
    results: dict[str, Any],
) -> dict[str, Any]:
    first, second = rounds
    with story.step(
        f"Learn {len(second.train)} {second.name}, without a look back at the {first.name}",
        f"Bayesian: the posterior of the {first.name} is the prior for the {second.name}. "
        "Deterministic: training goes on.",
    ):
        later = {
            POINT: steps.fine_tuned(fitted[POINT], second, settings, story.bars),
            BAYES: fitted[BAYES].update(second.train, progress=story.bars),
        }
        changes, forecasts, rows = {}, {}, []
        for name, posterior in later.items():
            before = {
                first.name: tests[name],
                second.name: steps.forecast(fitted[name], second.test, settings),
            }
            after = {each.name: steps.forecast(posterior, each.test, settings) for each in rounds}
            forecasts[name] = after
            changes[name] = {
                domain: {"before": steps.scores(before[domain]), "after": steps.scores(test)}
                for domain, test in after.items()
            }
            rows += [
                (name, domain, *(change[when][s] for s in ("accuracy", "nll") for when in change))
                for domain, change in changes[name].items()
            ]
        story.table(
            f"On {first.name} it shows what is kept, on {second.name} what is learnt",
            ("", "tested on", "acc. before", "after", "NLL before", "after"),
            rows,
            left=2,
        )
    results["update"] = changes
    return {"posterior": later[BAYES], "forecasts": forecasts}


def _compare(
    tests: Tests, after: dict[str, Tests], rounds: tuple[Round, Round]
) -> list[Comparison]:
    """After round 1 against the rival with temperature scaling, after round 2 the updates."""
    where = f"{rounds[0].name}, round 1"
    return [
        compare(metric, where, (BAYES, tests[BAYES]), (SCALED, tests[SCALED]))
        for metric in ("accuracy", "NLL", "ECE")
    ] + [
        compare(
            metric,
            f"{domain}, after round 2",
            ("Bayesian update", after[BAYES][domain]),
            ("plain fine-tuning", after[POINT][domain]),
        )
        for domain in (each.name for each in rounds)
        for metric in ("accuracy", "NLL")
    ]


def _save(
    before: Posterior,
    after: Posterior,
    rounds: tuple[Round, Round],
    tests: Tests,
    settings: Settings,
    out: Path,
    story: Story,
) -> None:
    with story.step(
        "Save everything",
        "A posterior is a folder of safetensors and JSON; ArviZ reads the netCDF file.",
    ):
        before.save(out / "posterior-1", overwrite=True)
        after.save(out / "posterior-2", overwrite=True)
        shown = rounds[1].test.select(range(settings.exported))
        idata = after.to_arviz(shown, samples=settings.samples, seed=settings.seed)
        idata.to_netcdf(str(out / "posterior-2.nc"))
        figures.reliability(
            {name: tests[name] for name in (POINT, SCALED, BAYES)}, out / "reliability.png"
        )
        figures.rejection({name: tests[name] for name in (POINT, BAYES)}, out / "rejection.png")


def _conclude(
    compared: list[Comparison], rounds: tuple[Round, Round], out: Path, story: Story
) -> None:
    story.table(
        f"Written to {out}",
        ("file", "what it is"),
        [
            ("posterior-1/, posterior-2/", "the posteriors of both rounds (Posterior.load)"),
            ("posterior-2.nc", "draws and predictions for ArviZ"),
            ("reliability.png", "confidence against accuracy, round 1"),
            ("rejection.png", "accuracy when the least certain are rejected"),
            ("results.json", "every number above"),
        ],
        left=2,
    )
    story.console.rule("Who won on what")
    story.table(
        "Bayesian minus rival: below 0 is better for NLL and ECE, above 0 for accuracy",
        ("", "tested on", "difference", "95 % interval"),
        [(c.metric, c.where, c.difference, f"{c.low:.3f} to {c.high:.3f}") for c in compared],
        left=2,
    )
    for line in summary(compared):
        story.say(line)
    story.say(
        f"One seed, {len(rounds[0].test)} test rows a domain: another seed gives other numbers. "
        f"{sum(story.seconds.values()):.0f} s in all."
    )
