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
# Twenty people rated each of these sentences. The model is to say what they thought, how far off it
# may be, and why: because the text does not tell (*aleatoric* uncertainty, which more data would
# not remove), or because it has not seen enough texts (*epistemic*, which they would). We know how
# far apart the twenty were, and never show it to the model: so its aleatoric uncertainty can be
# held against something. Everything comes from PyPI; no model hub is needed.
#
# PEFT in short: the transformer stays frozen; small matrices beside its layers (LoRA, adapter,
# prefix), and a linear *head* on top, adapt it. Here the head alone does, so that each text goes
# through the transformer once and a cell takes seconds. With `bh.presets.bh_peft()` in place of
# `head_only()` the others are random as well, and every call below stays as it is.
#
# Pyro in short: a *prior* says what weights are plausible before any data, a *likelihood* how
# labels come about once the weights are known. A *guide* is a family of simple distributions;
# fitting finds the member nearest to the posterior. A *draw* is one set of all weights.
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
import numpy as np
import torch
from scipy.stats import bootstrap, rankdata, zscore
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro import metrics
from bhpeft_pyro.data.assets import minilm, sentiment
from bhpeft_pyro.forecast import RatingForecast
from bhpeft_pyro.plots.forecasts import BLUE, STYLES, VERMILLION

# Set BHPEFT_SMALL=1 to see in a minute that everything runs; the numbers then mean nothing.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, test, epochs = (16, 12, 1) if small else (500, 400, 15)

# %% [markdown]
# ## The data
#
# Sentences from film reviews and from newspaper editorials, published with VADER (Hutto and
# Gilbert, 2014): the mean of the ratings, from -4 to 4, and their standard deviation over the
# raters. The editorials are not learnt; they come in later.

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
# The head gives two numbers for each text. One is the mean rating, the other the scale of the noise
# around it: `HeteroscedasticNormal`, a Normal whose sd depends on the text. Beside it we fit the
# simpler `Normal`, which learns one scale of noise for all texts. The prior is the default one. The
# guide is `laplace`: a trained point, and a width around it that suits a fifth of the sentences,
# which `fit` holds out. A head alone has but one mode, so one component will do.

# %%
backbone = AutoModel.from_pretrained(minilm())
posteriors = {}
for name, by_text in (("one noise scale", False), ("noise by text", True)):
    model = bh.tasks.ratings(backbone, -4, 4, noise_by_text=by_text, kinds=bh.presets.head_only())
    posteriors[name] = bh.fit(model, "laplace", learnt, components=1, epochs=epochs, progress=False)
    print(model.likelihood, posteriors[name].report, "", sep="\n")

# %% [markdown]
# ## The forecast
#
# A draw gives a mean and a noise scale for each text, so a forecast is a mixture of Normals. Its
# variance is the sum of two: the mean of the draws' noise variances (aleatoric), and the variance
# of the draws' means (epistemic). With one noise scale no draws are needed: the mean is Normal
# itself.

# %%
forecast = posteriors["noise by text"].predict(films)
print(forecast)

# %% [markdown]
# Is it any good? We hold it against the fit with one scale of noise, and against a forecast that
# has not read the texts and says of each what the learnt ratings are on the whole. CRPS is in the
# unit of the ratings and the absolute error where a forecast is a single point; it rewards honest
# widths. NLL does too, and punishes more for being far off.

# %%
ratings = torch.tensor(learnt["label"])
blind = RatingForecast.from_draws(
    ratings.mean().expand(1, test), ratings.std().expand(1, test), labels=films["label"]
)
one_scale = posteriors["one noise scale"].predict(films)
rivals = {"without reading": blind, "one noise scale": one_scale, "noise by text": forecast}
print(f"{'':16}{'MSE':>8}{'MAE':>8}{'NLL':>8}{'CRPS':>8}{'in 90 % interval':>19}")
for name, each in rivals.items():
    scores = metrics.evaluate(each)
    print(f"{name:16}", *(f"{scores[key]:7.3f}" for key in ("mse", "mae", "nll", "crps")), end="")
    print(f"{scores['coverage_90']:18.1%}")

# %% [markdown]
# The first row is what reading has to beat.
#
# ## Do the intervals hold?
#
# An interval of 80 % should hold eight ratings in ten, and among those that do, narrower is better.
# The grey band is where the share of an honest forecast lies 19 times in 20, with so few sentences.

# %%
levels = np.linspace(0.1, 0.95, 18)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
error = 1.96 * np.sqrt(levels * (1 - levels) / test)
left.fill_between(levels, levels - error, levels + error, color="0.85", label="honest, 95 %")
for (name, each), (colour, marker) in zip(rivals.items(), STYLES, strict=False):
    inside, width = zip(*(metrics.coverage(each, level=level) for level in levels), strict=True)
    left.plot(levels, inside, marker, color=colour, markersize=4, label=name)
    right.plot(levels, width, marker, color=colour, markersize=4, label=name)
left.set(xlabel="probability of the interval", ylabel="share of ratings within it")
right.set(xlabel="probability of the interval", ylabel="mean width (rating points)", ylim=0)
left.legend()
_ = right.legend()

# %% [markdown]
# Film ratings have two humps and few values near 0 (see the forecast without reading), and a Normal
# has one. This is a wrong likelihood, which no posterior over its weights can mend.
#
# ## Does it know where people disagree?
#
# Spearman's correlation of the aleatoric sd with the raters' own sd, over the test sentences. Its
# interval is a bootstrap's: sentences are drawn again, with replacement. As a yardstick we teach
# another head the raters' sd itself: how well can it be read from these texts, by the same
# transformer, when it is what one asks for?


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
left.set(xlabel="raters' own sd", ylabel="predicted aleatoric sd (rating points)")
fifths = np.array_split(np.argsort(forecast.sd.numpy()), 5)
claimed = [forecast.sd.numpy()[i].mean() for i in fifths]
found = [np.sqrt((miss[i] ** 2).mean()) for i in fifths]
ends = [min(claimed + found), max(claimed + found)]
right.plot(ends, ends, "--", color="black", linewidth=1, label="honest")
right.plot(claimed, found, "o", color=VERMILLION, label="a fifth of the sentences")
right.set(xlabel="predicted sd, mean of a fifth", ylabel="root mean square error in it")
_ = right.legend()

# %% [markdown]
# Three reasons to be careful with the first line:
#
# - The model is taught means of twenty ratings. Its noise is what it cannot read in a text; of the
#   variance between raters only a twentieth is left in such a mean.
# - The spread itself may hardly be in these features: see the head that is taught it.
# - People agree on ratings far from 0. What aleatoric sd and spread share may well be that.
#
# ## Texts of another kind
#
# Newspaper editorials are not what it has learnt. Epistemic uncertainty should say so, and
# aleatoric uncertainty need not. AUROC is the probability that an editorial is less certain than a
# film sentence; 0.5 is chance.

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
left.set(xlabel="aleatoric variance", ylabel="epistemic variance")
left.legend()
for by, (colour, marker) in zip(("total", "epistemic"), STYLES, strict=False):
    rejected, error = metrics.rejection_curve(forecast, by=by)
    right.plot(
        100 * rejected, error, marker, linestyle="-", color=colour, label=f"by {by} variance"
    )
right.axhline(metrics.evaluate(forecast)["mse"], color="black", linestyle=":", label="at random")
right.set(xlabel="handed to a human (%)", ylabel="MSE of the rest", ylim=0)
_ = right.legend()

# %% [markdown]
# Epistemic variance should be larger for the editorials. Aleatoric variance need not be: editorials
# are rated nearer to 0. Different from what was learnt is not the same as hard.
#
# ## What to flag
#
# The one in fifty of the film sentences that it is least sure of:

# %%
for i in forecast.flag(0.02, by="total").tolist():
    print(f"said {forecast.mean[i]:+.1f} +- {forecast.sd[i]:.1f}", end=", ")
    print(f"in truth {forecast.labels[i]:+.1f} (raters' sd {spread[i]:.1f})", end=" | ")
    print(f"{forecast.texts[i]:.100}")

# %% [markdown]
# A flag says that the model is unsure, not that people were.
#
# More sentences, the hybrid, and a likelihood with two humps are what one would try next.
