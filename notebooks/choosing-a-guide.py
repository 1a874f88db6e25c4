# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Choosing a guide
#
# A guide is the family of distributions in which `fit` looks for the posterior. What does each
# cost, and how near does it come? Cost is shown for MiniLM. Nearness can be checked only where the
# true posterior is within reach, so that part uses a transformer of width 16 with random weights
# and made-up words. What difference it makes to real sentences comes last.
#
# The families: `delta` is a point, ordinary fine-tuning. `normal` gives each weight an independent
# Normal. `full` is one Normal over all weights with any covariance. `lowrank` is the same with a
# covariance that differs from the prior's along 64 directions of its own choice. `laplace`, the
# default, trains points and then measures a covariance around each: a mixture of Laplace
# approximations, of five components unless one says otherwise.
#
# *The outputs kept here are of a small run (`BHPEFT_SMALL=1`): their numbers mean nothing. Run the
# notebook, or `make notebooks`, for real ones.*

# %%
import logging
import os
import warnings

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress")
logging.getLogger("transformers").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import pyro.distributions as dist
from pyro.infer import MCMC, NUTS
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro import diagnostics, guides
from bhpeft_pyro.data.assets import minilm, sentiment, two_rounds
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer

# Set BHPEFT_SMALL=1 to see in a minute that everything runs; the numbers then mean nothing.
small = os.environ.get("BHPEFT_SMALL") == "1"
steps, chain, worlds, train = (4, 20, 20, 16) if small else (200, 400, 60, 300)
quick = {"max_steps": steps, "progress": False}

# %% [markdown]
# ## What it takes
#
# Memory is known before a guide is made. These are LoRA, adapter and prefix of MiniLM with a head
# of two classes:

# %%
backbone = AutoModel.from_pretrained(minilm())
hybrid = bh.Model(bh.RandomPEFT(backbone, bh.presets.bh_peft(), bh.Head(2)))
sizes = {site.name: site.numel for site in hybrid.sites}
latents = sum(sizes.values())
head = sizes["head.weight"] + sizes["head.bias"]
costs = {name: guides.budget(name, latents) for name in ("delta", "normal", "lowrank", "full")}
costs["full head, normal rest"] = guides.budget("full", head) + guides.budget(
    "normal", latents - head
)
for name, cost in costs.items():
    print(f"{name:22} {cost.latents:,} latents, {cost.bytes / 2**20:12,.1f} MiB")

# %% [markdown]
# `full` over all weights is refused; over the head alone it is small, and a mapping gives each
# block of weights a family of its own:

# %%
try:
    bh.autoguide("full", hybrid)
except bh.errors.GuideError as error:
    print(error)
blocks = {"head.*": "full", "*": "normal"}

# %% [markdown]
# ## What a step costs
#
# The same number of steps with the tiny transformer and LoRA, on the same 32 examples. Seconds
# depend on the machine, so we divide by those of `delta`, ordinary fine-tuning.

# %%
data = tiny_examples(32)
tiny = bh.RandomPEFT(tiny_backbone(), bh.presets.lora(rank=2), bh.Head(2), tiny_tokenizer())
seconds = {}
for guide in ("delta", "laplace", "normal", "lowrank", "full", blocks):
    model = bh.Model(tiny, dist.Normal(0.0, 0.3))
    report = bh.fit(model, guide, data, components=1, **quick).report
    name = "blocks" if isinstance(guide, dict) else guide
    seconds[name] = report.seconds / report.steps
    print(f"{name:8} {seconds[name] / seconds['delta']:5.1f} times delta")

# %% [markdown]
# One run each, so small differences mean nothing. `laplace` takes the steps of a point; its width
# is measured after them, and five components cost five fits. `normal` draws its weights for parts
# of a batch; `lowrank` and `full` also measure their covariance several times in a fit. Beside so
# tiny a transformer such extras look large. `make bench` times MiniLM.
#
# ## The truth, where it can be had
#
# With the tiny transformer frozen, the head has 34 weights. NUTS draws them from the true
# posterior. The head must see the same features both times, so it keeps no axes of its own
# (`principal=False`).

# %%
network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(2, principal=False), tiny_tokenizer())
model = bh.Model(network, dist.Normal(0.0, 1.0))
batch = next(data.batches(len(data)))
frozen = bh.Batch({}, batch.labels, features=network.features(batch))
mcmc = MCMC(
    NUTS(model, jit_compile=False), num_samples=chain, warmup_steps=chain // 2, disable_progbar=True
)
mcmc.run(frozen)
truth = mcmc.get_samples()

# %% [markdown]
# Three questions to each guide. How far are its mean predictions from those of NUTS, in sds of the
# true posterior? How wide are its predictions, as a multiple of the true width? And k-hat, which
# needs no reference: up to 0.5 is good, above 0.67 the draws cannot be reweighted to the posterior.

# %%
places = tiny_examples(40, seed=1)
for name in ("laplace", "normal", "lowrank", "full"):
    fitted = bh.fit(model, name, data, components=1, lr=0.05, **quick)
    compared = diagnostics.against(fitted, truth, places)
    k_hat = diagnostics.psis(fitted, data).k_hat
    print(f"{name:8} means off by {compared.error:4.2f}, widths {compared.ratio:4.2f}", end="")
    print(f" of the true ones, k-hat {k_hat:5.2f}")

# %% [markdown]
# `lowrank` and `full` print the same: the head has fewer weights than the 64 directions of a
# low-rank guide, so each has any covariance. After 200 steps their mean predictions are a tenth of
# a true sd off (400 draws of NUTS leave 0.06 of noise), and their predictions a little too wide.
# `laplace` holds no rows out of so few, and so has the prior that we gave it. Its centre is the
# mode, and it keeps 16 directions: its means are a quarter of a sd off, its predictions an eighth
# too wide. `normal` takes weights for independent: its predictions are much too wide, and k-hat
# says so without NUTS.
#
# ## Does the end depend on the start?
#
# It should not. `normal` starts at widths that `fit` takes from the data; here we start it at sds
# of 0.001 and of 0.1 instead, where the prior's is 1, and take twice as many steps. (The mean sd
# over the head's 34 weights.)

# %%
for start in (None, 0.001, 0.1):
    guide = bh.autoguide("normal", model, init_scale=start)
    ended = bh.fit(model, guide, data, max_steps=2 * steps, progress=False)
    widths = [scale.flatten() for scale in ended.guide.scales().values()]
    mean = sum(float(width.sum()) for width in widths) / sum(len(width) for width in widths)
    compared = diagnostics.against(ended, truth, places)
    name = "by fit" if start is None else f"{start:g}"
    print(f"started at {name:7} ends at {mean:.3f}, means off by {compared.error:4.2f}", end="")
    print(f", widths {compared.ratio:4.2f} of the true ones")

# %% [markdown]
# One end, from a start six hundred times too narrow as well. Twice as many steps have not made the
# predictions narrower either: that error is the family's, not the fit's.
#
# ## Is it right on average?
#
# One data set may flatter a guide. Simulation-based calibration draws many: weights from the prior,
# labels from the likelihood, a fit to each, and where the truth ranks among 99 draws of the fit. If
# the guide were the posterior, every rank would be equally likely. The curves are the shares of
# ranks up to here, less what they should be; those of an exact posterior would all stay in the band
# 99 times in 100.

# %%
words = [f"w{5 + i % 10} w{15 + i}" for i in range(24)]
figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for name, ax in zip(("normal", "full"), axes, strict=True):
    found = diagnostics.sbc(model, name, words, replications=worlds, **quick)
    found.plot(ax).set_title(f"{name}, {worlds} data sets")
    print(name, found, "", sep="\n")

# %% [markdown]
# `full` passes, as far as 60 data sets can tell. `normal` fails by the likelihood of the labels:
# the truth makes them likelier than nearly every one of its draws does, as these are too wide. Its
# predictions at three texts show no bias.
#
# ## Real sentences
#
# Sentences from film reviews, positive or negative? The head of MiniLM alone is random, so that
# even `full` can be had; its 770 weights read what the transformer makes of a sentence.

# %%
movies, _ = two_rounds(sentiment(), (train, 8), 8, train, seed=0)
print(movies)
heads = bh.Model(bh.RandomPEFT(backbone, bh.presets.head_only(), bh.Head(2)))
print(f"{'':9}{'accuracy':>9}{'NLL':>8}{'ECE':>8}{'epistemic':>11}{'k-hat':>8}")
for name in ("delta", "normal", "lowrank", "full"):
    fitted = bh.fit(heads, name, movies.train, epochs=1 if small else 8, progress=False)
    scores = fitted.evaluate(movies.test, 100)
    print(f"{name:9}{scores['accuracy']:9.3f}{scores['nll']:8.3f}{scores['ece']:8.3f}", end="")
    print(f"{scores['mutual_information']:11.3f}", end="")
    print("" if name == "delta" else f"{diagnostics.psis(fitted, movies.train).k_hat:8.2f}")

# %% [markdown]
# The accuracies are the same, as far as 300 sentences can tell (a standard error is 0.027). By NLL
# and ECE the point estimate is ahead here, `lowrank` and `full` are close behind, and `normal`,
# whose predictions are too wide, comes last. What a width buys is the epistemic column: how much of
# an answer's uncertainty more data could remove. Over 770 weights no k-hat is below its limit of
# 0.67, and over the hundred thousand of a hybrid it is far above 1 for any guide. What is left to
# compare then are scores on test data of one's own.
#
# ## So which one?
#
# Start with `laplace`. Take `normal` for heavy-tailed or hierarchical priors; `full` for a head of
# some hundred weights; `delta` where only accuracy counts, and `widen` it when it does not. With
# PEFT weights in the transformer the guides differ more than here: the documentation's results
# compare them on five seeds.
