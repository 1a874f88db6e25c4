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
# # Writing priors
#
# A prior is a Pyro stochastic function of the sites, the random weight tensors. This notebook
# checks what a prior implies before any data, and shows three priors with structure: scales of
# layers (ready-made), scales of LoRA's directions, and which layers need which kind of weights.
# Everything comes from PyPI; no model hub is needed.

# %%
import logging
import os
import sys
import warnings

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress")
logging.getLogger("transformers").setLevel(logging.ERROR)

import pyro
import pyro.distributions as dist
import torch
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro import priors
from bhpeft_pyro.data.assets import minilm

sys.path.insert(0, "..")  # the repository: its tools fetch the data
from tools.sentiment import sentiment, two_rounds

# BHPEFT_SMALL=1 checks in a minute that everything runs; the numbers are then meaningless.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, test, epochs, samples = (16, 16, 1, 4) if small else (200, 200, 6, 8)

# %% [markdown]
# ## Data and model
#
# The task is to classify sentences from film reviews as positive or negative.

# %%
movies, _ = two_rounds(sentiment(), (train, 8), 8, test, seed=0)
backbone = AutoModel.from_pretrained(minilm())
print(movies)


def model(prior, kinds=None):
    return bh.Model(bh.RandomPEFT(backbone, kinds or bh.presets.bh_peft(), bh.Head(2)), prior)


def fit(prior, kinds=None):
    fitted = bh.fit(model(prior, kinds), "normal", movies.train, epochs=epochs, progress=False)
    scores = fitted.evaluate(movies.test, samples)
    print(f"accuracy {scores['accuracy']:.3f}, NLL {scores['nll']:.3f}")
    return fitted


# %% [markdown]
# ## The default, and prior predictive checks
#
# The first fit also chooses the coordinates of the PEFT weights, in which a prior scale corresponds
# to a change of the predictions. So we first fit with the default prior.

# %%
normal = fit(priors.default())

# %% [markdown]
# What does a prior imply for predictions? We draw weights from it, run the transformer with them,
# and compare with the same head on the frozen features: by how many nats (KL divergence) do the
# PEFT weights change the predictions? For comparison, a fair coin has 0.69 nats. Before any labels,
# the change should be much smaller than that.

# %%
network = normal.model.network
peft = {site.name for site in network.sites if site.role != "head"}
texts = normal.encode(movies.train.select(range(min(32, train))))
batch = next(texts.batches(32))


def moved(prior, draws=8):
    """The mean change of the predictions, in nats, by PEFT weights drawn from a prior."""
    prior = priors.as_prior(prior)
    with torch.no_grad(), pyro.plate("draws", draws, dim=-2):
        weights = priors.checked(prior, network.sites)
        off = {n: torch.zeros_like(w) if n in peft else w for n, w in weights.items()}
        p, q = (normal.model.predictive(w, batch) for w in (off, weights))
    return torch.distributions.kl_divergence(p, q).mean().item()


def own(sites):
    """A custom prior: the scale of LoRA grows with the layer; everything else is the default."""
    usual = priors.default()
    values = usual([site for site in sites if not site.name.startswith("lora")])
    for site in sites:
        if site.name.startswith("lora"):
            growth = torch.linspace(0.5, 2.0, site.shape[0]).reshape(-1, 1, 1)
            normal = dist.Normal(0.0, 0.1 * growth * site.unit)
            values[site.name] = pyro.sample(
                site.name, normal.expand(site.shape).to_event(site.ndim)
            )
    return values


# %% [markdown]
# Two priors with structure follow. `ready` has the means and sds of the default prior, five times
# as wide. `ready.normal(site)` samples a site from it, and `ready.non_centred(site, factor)`
# multiplies its sd by a factor that was sampled.

# %%
ready = priors.FunctionSpaceNormal(change=0.5)


def ard(sites):
    """ARD: each direction of LoRA in each layer has a scale of its own."""
    values = {}
    for site in sites:
        if site.role == "output" and site.name.startswith("lora."):
            ones = torch.ones(site.shape[0], 1, site.shape[-1])  # layer, out, rank
            scale = pyro.sample(f"scale.{site.name}", dist.HalfNormal(ones))
            values[site.name] = ready.non_centred(site, scale)
        else:
            values[site.name] = ready.normal(site)
    return values


def gates(sites):
    """Gates: each kind of PEFT weight is needed in a layer with probability 1/2."""
    gate, values = {}, {}
    for site in sites:
        kind = site.name.split(".")[0]
        if site.role != "output":
            values[site.name] = ready.normal(site)
            continue
        if kind not in gate:
            logits = dist.Logistic(torch.zeros(site.shape[0]), 2.0)
            gate[kind] = pyro.sample(f"gates.{kind}", logits).sigmoid()
        open_share = gate[kind].reshape(-1, *[1] * (site.ndim - 1))
        values[site.name] = ready.non_centred(site, open_share)
    return values


pyro.set_rng_seed(0)
for name, prior in {
    "default": priors.default(),
    "one's own": own,
    "Hierarchical": priors.Hierarchical(),
    "ARD": ard,
    "gates": gates,
    "ten times wider": priors.FunctionSpaceNormal(change=1.0, spread=1.0),
    "N(0, 1)": dist.Normal(0.0, 1.0),
}.items():
    print(f"{name:16} {moved(prior):7.3f} nats")

# %% [markdown]
# ## Hierarchical: which layers change more?
#
# Every layer has a scale, and the scales within one site are tied to each other. These are the
# medians of the scale factors under the prior and the posterior:

# %%
hierarchical = fit(priors.Hierarchical())
with pyro.plate("draws", 2000, dim=-2), torch.no_grad():
    trace = pyro.poutine.trace(hierarchical.model.prior).get_trace(network.sites[:1])
before = trace.nodes["lora.query.A.log_layers"]["value"][:, 0].exp()
print(f"{'prior':13}", "  ".join(f"{m:4.2f}" for m in before.quantile(0.5, 0).tolist()))
draws = hierarchical.sample(500)
for site in network.sites:
    if site.name in peft:
        factors = draws[f"{site.name}.log_layers"].exp()
        print(f"{site.name:13}", "  ".join(f"{m:4.2f}" for m in factors.quantile(0.5, 0).tolist()))

# %% [markdown]
# The prior median is exp(-1/2), about 0.6, rather than 1. This makes the marginal standard
# deviation of a weight the same as under the default prior. After the fit, the output sides (LoRA
# B, the adapter's up-projection, the prefix values) mostly have smaller factors, with moderate
# differences between layers. The factors of the input sides have hardly changed. So these 200
# sentences call for a smaller change in most layers, and single out none.
#
# ## ARD: which of LoRA's directions are used?
#
# ARD (automatic relevance determination) gives each of the 8 columns of a layer's B a scale of its
# own, so that it can switch off columns that the data do not need. The prior of a scale is a
# half-Normal, with mean 0.8. For each layer we print the smallest and the largest of the 8 scales.
#
# This fit shows how to read a structure; it is not a good model, as its accuracy shows. Its prior
# is five times as wide as the default (`change=0.5`), which adds more noise than 200 sentences can
# compensate. The default `change` gives better predictions, but less certain answers about
# structure.

# %%
directions = fit(ard, bh.presets.lora(rank=8)).to_arviz(sites=["scale.*"])
for group in ("prior", "posterior"):
    for name, draws in directions[group].items():
        scales = draws.mean(["chain", "draw"]).values.squeeze()  # layer, rank
        for what, ends in (("smallest", scales.min(-1)), ("largest", scales.max(-1))):
            print(f"{group:9} {name:20} {what:8}", "  ".join(f"{end:4.2f}" for end in ends))

# %% [markdown]
# ## Gates: which layers need which kind?
#
# Under the prior, every layer needs every kind with probability 0.5. These are the probabilities
# after the fit, whose prior is as wide as that of ARD:


# %%
def probabilities(posterior: bh.Posterior) -> None:
    logits = posterior.to_arviz(sites=["gates.*"]).posterior
    for name, layers in (logits > 0).mean(["chain", "draw"]).items():
        print(f"{name:14}", "  ".join(f"{p:4.2f}" for p in layers.values))


gated = fit(gates)
probabilities(gated)

# %% [markdown]
# Where a probability stays near that of the prior, the sentences say nothing about it. Trust the
# gates only of a fit whose test NLL (negative log likelihood) is no worse than that of
# the default prior. Scales and gates are latent variables like any other, so an update continues to
# learn them:

# %%
updated = gated.update(movies.validation, max_steps=5)
probabilities(updated)
