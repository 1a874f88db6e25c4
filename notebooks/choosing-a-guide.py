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
# and made-up words.

# %%
import logging
import os
import warnings

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress")
logging.getLogger("transformers").setLevel(logging.ERROR)

import pyro.distributions as dist
from pyro.infer import MCMC, NUTS
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro import diagnostics, guides
from bhpeft_pyro.demo.assets import minilm
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer

# Set BHPEFT_SMALL=1 to see in a minute that everything runs; the numbers then mean nothing.
small = os.environ.get("BHPEFT_SMALL") == "1"
steps, chain = (4, 20) if small else (100, 200)
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
# The `linear` guide takes what `lowrank` takes. `full` over all weights is refused; over the head
# alone it is small, and a mapping gives each block of weights a family of its own:

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
for guide in ("delta", "normal", "lowrank", "linear", "full", blocks):
    report = bh.fit(bh.Model(tiny, dist.Normal(0.0, 0.3)), guide, data, **quick).report
    name = "blocks" if isinstance(guide, dict) else guide
    seconds[name] = report.seconds / report.steps
    print(f"{name:8} {seconds[name] / seconds['delta']:5.1f} times delta")

# %% [markdown]
# One run each, so small differences mean nothing. `normal` draws its weights for parts of a batch;
# `lowrank`, `linear`, `full` also measure their covariance several times in a fit. Beside so tiny
# a transformer such extras look large. `make bench` times MiniLM.
#
# ## The truth, where it can be had
#
# With the tiny transformer frozen, the head has 34 weights. NUTS draws them from the true
# posterior. The head must see the same features both times, so it keeps no axes of its own
# (`principal=False`).

# %%
network = bh.RandomPEFT(
    tiny_backbone(), (), bh.Head(2, principal=False), tiny_tokenizer(), aligned=False
)
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
# needs no reference: up to 0.5 is good, above 0.67 the draws cannot be reweighted to the
# posterior.

# %%
places = tiny_examples(40, seed=1)
for name in ("normal", "lowrank", "full"):
    fitted = bh.fit(model, name, data, **quick)
    compared = diagnostics.against(fitted, truth, places)
    k_hat = diagnostics.psis(fitted, data).k_hat
    print(f"{name:8} means off by {compared.error:4.2f}, widths {compared.ratio:4.2f}", end="")
    print(f" of the true ones, k-hat {k_hat:5.2f}")

# %% [markdown]
# `lowrank` and `full` are as close to the truth as 200 draws of NUTS can tell, and print the same:
# the head has fewer weights than the 128 directions of `lowrank`, so both have any covariance.
# `normal` takes weights for independent. After 100 steps its mean predictions are about half a
# true sd off, its predictions are too wide, and k-hat says so without NUTS. `delta` has no width
# at all, and `linear` is `lowrank` here: a head is linear as it is.
#
# This holds for 34 weights, 32 examples and 100 steps. Over thousands of weights k-hat is above 1
# for any guide, and what is left to compare are scores on test data of one's own.
