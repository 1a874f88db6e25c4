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
# A guide is the family of distributions in which `fit` searches for the posterior. What does each
# family cost, and how close does it get? We measure memory with MiniLM. Accuracy of the
# approximation can be checked only where the true posterior can be sampled, so that part uses a
# transformer of width 16 with random weights and made-up words. At the end we compare the guides on
# real sentences.
#
# The families:
#
# - `delta` is a point estimate, ordinary fine-tuning.
# - `normal` has an independent Normal for each weight.
# - `mvn` is one Normal over all weights with any covariance, Pyro's `AutoMultivariateNormal`.
# - `laplace`, the default, trains point estimates and computes a covariance around each from the
#   curvature of the loss. It is a mixture of five Laplace approximations.

# %%
import logging
import os
import sys
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
from bhpeft_pyro import diagnostics
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer

sys.path.insert(0, "..")  # the repository: its tools fetch the data
from tools.sentiment import sentiment, two_rounds

# BHPEFT_SMALL=1 checks in a minute that everything runs; the numbers are then meaningless.
small = os.environ.get("BHPEFT_SMALL") == "1"
steps, chain, worlds, train = (4, 20, 20, 16) if small else (200, 400, 60, 300)
quick = {"max_steps": steps, "progress": False}

# %% [markdown]
# ## Memory
#
# The memory of a guide follows from its number of weights: `docs/backbones.md` has the
# formulas. The model has LoRA, adapter and prefix weights on MiniLM, and a head with two classes:

# %%
backbone = AutoModel.from_pretrained(minilm())
hybrid = bh.Model(bh.RandomPEFT(backbone, bh.presets.bh_peft(), bh.Head(2)))
sizes = {site.name: site.numel for site in hybrid.sites}
latents = sum(sizes.values())
head = sizes["head.weight"] + sizes["head.bias"]
costs = {
    "delta": 16 * latents,
    "normal": 32 * latents,
    "laplace": 4 * latents * (5 + 4 * 16 + 256 + 15 * 16 + 256),
    "mvn": 16 * latents * (latents + 2),
    "mvn, head only": 16 * head * (head + 2),
}
for name, cost in costs.items():
    print(f"{name:22} {cost / 2**20:12,.1f} MiB")

# %% [markdown]
# `mvn` over all weights takes too much. Over a head alone it is small. A mapping from patterns of
# site names makes some weights random and leaves others as point estimates:

# %%
blocks = {"head.*": "normal", "*": "delta"}

# %% [markdown]
# ## What a step costs
#
# We run the same number of steps with the tiny transformer and LoRA, on the same 32 examples. Since
# times depend on the machine, we divide by the time of `delta`, ordinary fine-tuning.

# %%
data = tiny_examples(32)
tiny = bh.RandomPEFT(tiny_backbone(), bh.presets.lora(rank=2), bh.Head(2), tiny_tokenizer())
seconds = {}
for guide in ("delta", "laplace", "normal", "mvn", blocks):
    model = bh.Model(tiny, dist.Normal(0.0, 0.3))
    report = bh.fit(model, guide, data, components=1, **quick).report
    name = "blocks" if isinstance(guide, dict) else guide
    seconds[name] = report.seconds / report.steps
    print(f"{name:8} {seconds[name] / seconds['delta']:5.1f} times delta")

# %% [markdown]
# Each guide ran once, so small differences are not meaningful. `laplace` trains like `delta` and
# computes its covariance afterwards; five components cost five fits. `normal` draws several sets of
# weights per batch, each for a part of it. `mvn` also multiplies a square matrix with all weights.
# `make bench` measures these costs with MiniLM.
#
# ## Comparison with the true posterior
#
# If only the head of the tiny transformer is random, there are 34 weights, and NUTS can sample the
# true posterior. Both methods must see the same features, so the head does not use principal axes
# (`principal=False`).

# %%
network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(2, principal=False), tiny_tokenizer())
model = bh.Model(network, dist.Normal(0.0, 1.0))
batch = next(data.batches(len(data)))
frozen = bh.data.Batch({}, batch.labels, features=network.features(batch))
mcmc = MCMC(
    NUTS(model, jit_compile=False), num_samples=chain, warmup_steps=chain // 2, disable_progbar=True
)
mcmc.run(frozen)
truth = mcmc.get_samples()

# %% [markdown]
# We compare three things. How far are the mean predictions of the guide from those of NUTS, in
# standard deviations (sds) of the true posterior? How wide are its predictions, as a multiple of
# the true width? And what is k-hat, a diagnostic that needs no reference? Up to 0.5 is good; above
# 0.67 the draws cannot be reweighted to the true posterior.

# %%
places = tiny_examples(40, seed=1)
reference = bh.Posterior.from_draws(model, truth).predict(places, chain, keep_samples=True)


def compare(posterior):
    """How far mean predictions are off, in true sds, and sds as multiples of the true ones."""
    ours, true = posterior.predict(places, 1000, keep_samples=True).samples, reference.samples
    off, widths = (ours.mean(0) - true.mean(0)) / true.std(0), ours.std(0) / true.std(0)
    return off.square().mean().sqrt(), widths.log().mean().exp()


for name in ("laplace", "normal", "mvn"):
    fitted = bh.fit(model, name, data, components=1, lr=0.05, **quick)
    error, ratio = compare(fitted)
    k_hat = diagnostics.psis(fitted, data).k_hat
    print(f"{name:8} means off by {error:4.2f}, widths {ratio:4.2f}", end="")
    print(f" of the true ones, k-hat {k_hat:5.2f}")

# %% [markdown]
# With so few rows `laplace` holds none out and uses the prior as given. It keeps 16 directions.
# `mvn` can represent any covariance, but trains 1,224 parameters by gradient steps; after 200 of
# them it is about as close. `normal` ignores correlations between weights, so its predictions are
# much too wide. k-hat shows that without NUTS, but rejects `mvn` too: it judges all weights.
#
# ## Does the result depend on the initial values?
#
# It should not. `fit` normally chooses the initial sds of `normal` from the data. Here we set them
# to 0.001 and 0.1 instead (the prior sd is 1), and take twice as many steps at the default learning
# rate. The output shows the mean sd over the 34 weights of the head.

# %%
for start in (None, 0.001, 0.1):
    guide = bh.autoguide("normal", model, init_scale=start)
    ended = bh.fit(model, guide, data, max_steps=2 * steps, progress=False)
    widths = [scale.flatten() for scale in ended.guide.scales().values()]
    mean = sum(float(width.sum()) for width in widths) / sum(len(width) for width in widths)
    error, ratio = compare(ended)
    name = "by fit" if start is None else f"{start:g}"
    print(f"started at {name:7} ends at {mean:.3f}, means off by {error:4.2f}", end="")
    print(f", widths {ratio:4.2f} of the true ones")

# %% [markdown]
# All fits end at nearly the same sds, even from an initial value six hundred times too small. More
# and smaller steps bring the means closer, but the predictions stay much too wide. So that error
# comes from the family, not from the fit.
#
# ## Is it right on average?
#
# A single data set may favour a guide by chance. Simulation-based calibration uses many. For each,
# it draws weights from the prior and labels from the likelihood, fits the guide, and ranks the true
# weights among 99 draws of the fit. If the guide were the exact posterior, all ranks would be
# equally likely. The curves show the cumulative share of ranks minus its expected value. For an
# exact posterior, all curves stay inside the band 99 times in 100.

# %%
words = [f"w{5 + i % 10} w{15 + i}" for i in range(24)]
figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for name, ax in zip(("normal", "laplace"), axes, strict=True):
    how = {"components": 1, "lr": 0.05, **quick}
    found = diagnostics.sbc(model, name, words, replications=worlds, **how)
    found.plot(ax).set_title(f"{name}, {worlds} data sets")
    print(name, found, "", sep="\n")

# %% [markdown]
# `normal` fails on a prediction, and on the likelihood of the labels: it is higher under the true
# weights than under nearly all of the draws, because these are spread too widely. `laplace` fails
# on the likelihood less clearly: a Normal around the mode cannot be as skewed as the posterior. Its
# predictions pass.
#
# ## Real sentences
#
# We classify sentences from film reviews as positive or negative. Only the head of MiniLM is
# random, with 770 weights, so that `mvn` is feasible too.

# %%
movies, _ = two_rounds(sentiment(), (train, 8), 8, train, seed=0)
print(movies)
heads = bh.Model(bh.RandomPEFT(backbone, bh.presets.head_only(), bh.Head(2)))
print(f"{'':9}{'accuracy':>9}{'NLL':>8}{'ECE':>8}{'epistemic':>11}{'k-hat':>8}")
for name in ("delta", "normal", "laplace", "mvn"):
    fitted = bh.fit(heads, name, movies.train, epochs=1 if small else 8, progress=False)
    scores = fitted.evaluate(movies.test, 100)
    print(f"{name:9}{scores['accuracy']:9.3f}{scores['nll']:8.3f}{scores['ece']:8.3f}", end="")
    print(f"{scores['mutual_information']:11.3f}", end="")
    print("" if name == "delta" else f"{diagnostics.psis(fitted, movies.train).k_hat:8.2f}")

# %% [markdown]
# The accuracies are the same, as far as 300 sentences can tell (the standard error is 0.027). So
# nearly are the NLL (negative log likelihood) and the ECE (calibration error): with a head alone
# there is little to gain, and `mvn` happens to be best. What a posterior adds is the epistemic
# column: how much of the uncertainty more data could remove. With 770 weights no k-hat is below the
# limit of 0.67, and with the hundred thousand weights of a hybrid it is far above 1 for any guide.
# Then the only comparison left is the score on test data of your own.
#
# ## Which one to use
#
# Start with `laplace`. Use `normal` for heavy-tailed or hierarchical priors, and `delta` if only
# accuracy matters; `widen` can add a covariance to it later.
# `bhpeft compare` compares the default with its rivals on your own data.
