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
# A prior is a Pyro function of the sites. Here are three ready ones that are about structure (the
# scales of layers, the rank of LoRA, which layers need which kind), and how to look at what a prior
# says before any data. Everything comes from PyPI; no model hub is needed.

# %%
import logging
import os
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
from bhpeft_pyro.data.assets import minilm, sentiment, two_rounds

# Set BHPEFT_SMALL=1 to see in a minute that everything runs; the numbers then mean nothing.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, test, epochs, samples = (16, 16, 1, 4) if small else (200, 200, 6, 8)

# %% [markdown]
# ## Data and model
#
# Sentences from film reviews: positive or negative?

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
# The first fit also chooses the coordinates in which priors of PEFT weights have a meaning, so we
# fit the default prior first.

# %%
normal = fit(priors.default())

# %% [markdown]
# What would a prior have us believe about texts? Draw weights from it, run the transformer under
# them, and compare with the same head on the frozen features: by how many nats do PEFT weights of
# this prior move the predictions? Between two labels a toss of a coin is worth 0.69 nats. Before
# it has seen labels a model should be moved by far less than that.

# %%
network = normal.model.network
peft = {site.name for site in network.sites if site.role != "head"}
texts = normal.encode(movies.train.select(range(min(32, train))))
batch = next(texts.batches(32))


def moved(prior, draws=8):
    """Nats by which PEFT weights drawn from a prior move the predictions, on average."""
    prior = priors.as_prior(prior)
    with torch.no_grad(), pyro.plate("draws", draws, dim=-2):
        weights = prior(network.sites)
        off = {n: torch.zeros_like(w) if n in peft else w for n, w in weights.items()}
        p, q = (normal.model.predictive(w, batch) for w in (off, weights))
    return torch.distributions.kl_divergence(p, q).mean().item()


def own(sites):
    """A prior of one's own: LoRA's scale grows with the layer, all else stays as it is."""
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


pyro.set_rng_seed(0)
for name, prior in {
    "default": priors.default(),
    "one's own": own,
    "Hierarchical": priors.Hierarchical(),
    "ARD": priors.ARD(),
    "Gates": priors.Gates(),
    "Horseshoe": priors.Horseshoe(),
    "ten times wider": priors.FunctionSpaceNormal(change=1.0, spread=1.0),
    "N(0, 1)": dist.Normal(0.0, 1.0),
}.items():
    print(f"{name:16} {moved(prior):7.3f} nats")

# %% [markdown]
# ## Hierarchical: which layers change more?
#
# Every layer has a scale, and those of one site are near each other. The medians of the factors
# before any data and after:

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
# The prior's median is 0.61, exp(-1/2), and not 1, so that the sd of a weight, its scale
# integrated out, is the default's. After the fit the output sides (LoRA B, the adapter's up, the
# prefix's values) have smaller factors than before, in all layers alike; the input sides have
# learnt nothing. So no layer stands out: 200 sentences ask for a smaller change everywhere.
#
# ## ARD: how much of LoRA's rank is used?
#
# Under a prior, as under a posterior that has learnt nothing about them, all columns are alike and
# the effective rank is the full one, 8. Data that do not need a column let ARD switch it off.
#
# Both this fit and the next show how to read a structure, not a good model: a prior five times as
# wide as the default's (`change=0.5`) is more noise than 200 sentences can pay for, and accuracy
# falls to chance. The default `change` gives usable predictions, and fewer certain answers about
# structure.

# %%
ard = fit(priors.ARD(change=0.5), bh.presets.lora(rank=8))
for name, fitted in (("default", normal), ("ARD", ard)):
    for site, layers in priors.effective_rank(fitted).items():
        if site.startswith("lora"):
            print(f"{name:8} {site:13}", "  ".join(f"{rank:3.1f}" for rank in layers.values()))

# %% [markdown]
# ## Gates: which layers need which kind?
#
# Before any data every layer needs every kind with probability 0.5. Afterwards:

# %%
gates = fit(priors.Gates(change=0.5))
for kind, layers in priors.gate_probabilities(gates).items():
    print(f"{kind:8}", "  ".join(f"{p:4.2f}" for p in layers.values()))

# %% [markdown]
# Where a probability stays near the prior's, the sentences say nothing about it. This fit predicts
# no better than chance, so its gates of 1.00 and 0.00 are accidents of the fit, and no evidence:
# believe those of a fit whose held-out NLL is better than the default prior's. The next round may
# know more: scales and gates are latents like any other, and an update carries them on.

# %%
updated = gates.update(movies.validation, max_steps=5)
for kind, layers in priors.gate_probabilities(updated).items():
    print(f"{kind:8}", "  ".join(f"{p:4.2f}" for p in layers.values()))
