"""What whole fits and predictions cost: by components, PEFT layers, rows and processes.

As in `cost`, what is compared takes turns. Times are those of the processor, so that other work
does not count; those of several processes are by the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch
from torch import distributed, multiprocessing

from bhpeft_pyro.data import Examples, encode
from bhpeft_pyro.data.examples import Tokens
from bhpeft_pyro.distributed import independent
from bhpeft_pyro.guides import DeltaGuide
from bhpeft_pyro.inference.passes import Feed
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft import presets
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer

from .budgets import Budget
from .cost import CLASSES, Step, hf_peft_step, in_turn, over, peak_bytes, svi_step, token_batch
from .job import Load
from .results import Run, commit, complete, load
from .tables import Table, distinct

__all__ = ["ABOUT", "scaling"]

ABOUT = "What do whole fits and predictions cost?"
_TRAINED, _HELD_OUT, _PREDICTED = 128, 32, 64  # rows
_LONGER = (300, 3000)  # steps of fits whose cost is computed
_FIRST = 8  # rows of a prediction that is little but the start of the program
_STEP, _PEER = "training step", "training step, LoRA of Hugging Face peft"
_UPPER = ", upper half of the layers"
_ROUNDS = 3  # of what is short
# A process inherits the peak memory of the one that starts it, so a small one does.
_WATCH = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""

Records = list[dict[str, Any]]


def scaling(load_frozen: Load, backbone: str, budget: Budget, seeds: int, out: Path) -> list[Table]:
    """Measure what is missing, once for each seed, and make the tables of what is there.

    Raises:
        ConfigError: Hugging Face peft is not there to compare with.
    """
    batch_size, tokens, steps = budget.fitted
    setting = (
        f"{backbone}, hybrid, {CLASSES} classes; {batch_size} texts of {tokens} tokens a step; "
        f"{_TRAINED} rows and {_HELD_OUT} held out"
    )

    def table(title: str, head: str, note: str, measure: Step, *sizes: object) -> Table:
        runs: list[Run] = [("scaling", title, *sizes, seed) for seed in range(seeds)]
        complete(out, runs, lambda *_: {**_machine(), "records": measure()})
        results = load(out, runs)
        records = [record for result in results for record in result["records"]]
        facts = (f"{name} {distinct(results, name)}" for name in _machine())
        return Table.over_seeds(title, [head], records, f"{note} {', '.join(facts)}.")

    fits = table(
        "fits and predictions",
        "what",
        f"{setting}. In units of a training step of a point estimate, and of LoRA of Hugging Face "
        f"peft; a fit takes {steps} steps, a prediction {_PREDICTED} texts. Memory is that of the "
        "frozen weights, and at most of the tensors, over that of a training step.",
        partial(_fits, load_frozen, *budget.fitted),
        backbone,
        *budget.fitted,
    )
    rows = table(
        "bhpeft predict by rows",
        "rows",
        f"A tiny random transformer. Times are without those of the first {_FIRST} rows, which the "
        "start of the program takes; its memory is the first row.",
        partial(_rows, budget.predicted),
        *budget.predicted,
    )
    processes = table(
        "fits by processes",
        "fit",
        f"{setting}; `delta`, {steps} steps, one thread a process. Two gloo processes against one, "
        "by the clock: it says something only if two processors were free.",
        partial(_processes, load_frozen, *budget.fitted),
        backbone,
        *budget.fitted,
    )
    return [fits, rows, processes]


def _machine() -> dict[str, Any]:
    return {
        "commit": commit(),
        "processors": os.cpu_count(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def _fits(load_frozen: Load, batch_size: int, tokens: int, steps: int) -> Records:
    """Whole fits; then steps, widths and predictions with what was fitted."""
    train, held_out, texts = _examples(load_frozen, tokens)
    fitted: dict[str, Posterior] = {}

    def whole(name: str, guide: str, components: int = 1, upper: bool = False) -> None:
        model = _model(load_frozen, upper)
        fitted[name] = _fit(model, guide, components, train, held_out, batch_size, steps)

    def step(upper: bool) -> Step:
        model = _model(load_frozen, upper)
        model.network.align(batch for _, batch in train.by_length(batch_size))
        batches = Feed(model, train).training(batch_size, 1, torch.Generator().manual_seed(0))
        return svi_step(model, DeltaGuide(model), next(batches), 1)

    backbone = load_frozen()[0]
    frozen = sum(p.numel() * p.element_size() for p in backbone.parameters())
    peer = hf_peft_step(backbone, next(train.batches(batch_size)))
    units = {_STEP: step(upper=False), _PEER: peer}
    runs: dict[str, Step] = {}
    for guide in ("delta", "laplace"):
        for where, upper in (("", False), (_UPPER, True)):
            name = f"{guide}{where}"
            runs[f"fit, {name}"] = partial(whole, name, guide, upper=upper)
        name = f"{guide}, 2 components"
        runs[f"fit, {name}"] = partial(whole, name, guide, 2)
    many = {name: partial(_repeat, unit, steps) for name, unit in units.items()}
    with pyro.validation_enabled(False):  # as in `fit`, after its first step
        seconds = in_turn(many | runs, 1, time.process_time)
        records = _in_units(runs, seconds, steps)
        single = units | {f"{_STEP}{_UPPER}": step(upper=True)}
        for where in ("", _UPPER):
            single[f"width{where}"] = partial(
                fitted[f"delta{where}"].widen, train, validation=held_out
            )
        for name, posterior in fitted.items():
            single[f"prediction, {name}"] = partial(posterior.predict, texts)
        short = _in_units(single, in_turn(single, _ROUNDS, time.process_time), 1)
        peaks = {name: frozen + peak_bytes(run) for name, run in single.items()}
    for record in short:
        record["memory"] = peaks[record["what"]] / peaks[_STEP]
    return _over_points(records, steps) + short


def _in_units(names: Iterable[str], seconds: Mapping[str, list[float]], count: int) -> Records:
    """Times in steps of training, of which `count` were timed together."""
    return [
        {
            "what": name,
            "training steps": count * over(seconds[name], seconds[_STEP]),
            "steps of HF peft's LoRA": count * over(seconds[name], seconds[_PEER]),
        }
        for name in names
    ]


def _over_points(records: Records, steps: int) -> Records:
    """Add what fits of `laplace` cost over those of `delta`; longer ones have only more steps.

    >>> found = [{"what": "fit, delta", "training steps": 20.0},
    ...          {"what": "fit, laplace", "training steps": 30.0}]
    >>> _over_points(found, 10)[1]["/ delta, 300 steps"]
    1.032258064516129
    """
    points = {r["what"]: r["training steps"] for r in records}
    for record in records:
        point = points[record["what"].replace("laplace", "delta")]
        many = 2 if "2 components" in record["what"] else 1
        for count in (steps, *_LONGER) if "laplace" in record["what"] else ():
            more = many * (count - steps)
            record[f"/ delta, {count} steps"] = (record["training steps"] + more) / (point + more)
    return records


def _model(load_frozen: Load, upper: bool) -> Model:
    """The hybrid on all layers or on the upper half of them."""
    backbone, tokenizer = load_frozen()
    kinds = presets.bh_peft()
    if upper:
        depth = backbone.config.num_hidden_layers
        kinds = tuple(replace(kind, layers=tuple(range(depth // 2, depth))) for kind in kinds)
    return Model(RandomPEFT(backbone, kinds, Head(CLASSES), tokenizer))


def _examples(load_frozen: Load, tokens: int) -> list[Examples]:
    """Rows to fit, to hold out and to predict, of random tokens, as many in each."""
    backbone, tokenizer = load_frozen()
    counts = [_TRAINED, _HELD_OUT, _PREDICTED]
    batch = token_batch(backbone, sum(counts), tokens)
    assert batch.labels is not None
    rows = {"text": [*map(str, range(len(batch)))], "label": batch.labels.tolist()}
    examples = encode(rows, tokenizer, kind="class", num_labels=CLASSES)
    ids = batch.inputs["input_ids"].tolist()
    examples = replace(examples, tokens=Tokens.of(tokenizer, ids, None))
    return [examples.subset(part) for part in torch.arange(len(batch)).split(counts)]


def _fit(
    model: Model,
    guide: str,
    components: int,
    train: Examples,
    held_out: Examples,
    batch_size: int,
    steps: int,
) -> Posterior:
    return fit(
        model,
        guide,
        train,
        validation=held_out,
        components=components,
        batch_size=batch_size,
        particles=1,
        max_steps=steps,
        progress=False,
    )


def _repeat(step: Step, count: int) -> None:
    for _ in range(count):
        step()


def _rows(counts: Sequence[int]) -> Records:
    """`bhpeft predict` in processes of its own, on larger and larger files."""
    records: Records = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny_backbone().save_pretrained(folder / "tiny")
        tiny_tokenizer().save_pretrained(folder / "tiny")
        backbone, tokenizer = load_backbone(str(folder / "tiny"), "cpu")
        model = Model(RandomPEFT(backbone, presets.bh_peft(), Head(2), tokenizer))
        posterior = fit(model, "laplace", tiny_examples(), max_steps=2, progress=False)
        posterior.save(folder / "run")
        for count in (_FIRST, *counts):
            data = folder / f"{count}.csv"
            data.write_text("text\n" + "".join(f"w{5 + i % 45} w9 w8 w7\n" for i in range(count)))
            seconds, peak = _watched("predict", folder / "run", data)
            started = records[0]["seconds"] if records else seconds
            record = {"rows": str(count), "seconds": seconds, "peak memory (MiB)": peak / 2**20}
            if records:
                record["ms a row"] = 1000 * (seconds - started) / (count - _FIRST)
            records.append(record)
    return records


def _watched(*arguments: object) -> tuple[float, int]:
    """Seconds of the processor and peak bytes of a `bhpeft` command."""
    words = [sys.executable, "-m", "bhpeft_pyro", *map(str, arguments)]
    done = subprocess.run([sys.executable, "-c", _WATCH, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024)


def _processes(load_frozen: Load, *sizes: int) -> Records:
    """The same fits by one process and by two."""
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (folder, load_frozen, *sizes), nprocs=2)
        records: Records = json.loads(Path(folder, "records").read_text())
    return records


def _rank(
    rank: int, folder: str, load_frozen: Load, batch_size: int, tokens: int, steps: int
) -> None:
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    train, held_out, _ = _examples(load_frozen, tokens)

    def run(components: int, together: bool) -> None:
        if together or rank == 0:
            with nullcontext() if together else independent():
                model = _model(load_frozen, upper=False)
                _fit(model, "delta", components, train, held_out, batch_size, steps)
        distributed.barrier()

    distributed.barrier()
    pairs = [(count, together) for count in (1, 2) for together in (False, True)]
    seconds = in_turn({str(pair): partial(run, *pair) for pair in pairs}, 1)
    if rank == 0:
        names = {1: "1 component: batches shared out", 2: "2 components: one a process"}
        records: Records = []
        for count, name in names.items():
            one, two = (seconds[str((count, together))] for together in (False, True))
            records.append({"fit": name, "two processes / one": over(two, one)})
        Path(folder, "records").write_text(json.dumps(records))
    distributed.destroy_process_group()
