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
# # An adapter that is trained already
#
# You have fine-tuned a classifier with LoRA, using Hugging Face's `peft` and `Trainer`. It gives
# probabilities, but you do not know when to trust them. Here the adapter becomes a posterior
# without being trained again, gets a threshold above which a person decides, and goes back to
# `peft`. The page "Coming from peft" in the documentation lists what is supported. Everything comes
# from PyPI; no model hub is needed.

# %%
import os
import sys
import warnings

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress")
warnings.filterwarnings("ignore", message=".*pin_memory.*")

import datasets
import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)  # fmt: skip

import bhpeft_pyro as bh
from bhpeft_pyro import plots
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.forecast.metrics import ood_auroc

logging.set_verbosity_error()
datasets.disable_progress_bars()

sys.path.insert(0, "..")  # the repository: its tools fetch the data
from tools.sentiment import LABELS, sentiment, two_rounds

# BHPEFT_SMALL=1 checks in a minute that everything runs; the numbers are then meaningless.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, held_out, test, epochs = (16, 20, 16, 1) if small else (400, 200, 400, 10)

# %% [markdown]
# ## Your adapter
#
# The task is to say whether a sentence of a film review is positive. Apart from the data, this cell
# needs nothing of bhpeft_pyro.

# %%
movies, tweets = two_rounds(sentiment(), (train, train // 2), held_out, test, seed=0)
tokenizer = AutoTokenizer.from_pretrained(minilm())


def plain_classifier():
    set_seed(0)  # of the layers that the checkpoint does not have
    return AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=2, id2label=dict(enumerate(LABELS))
    )


config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
model = get_peft_model(plain_classifier(), config)
rows = movies.train.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
arguments = TrainingArguments(
    "trained", num_train_epochs=epochs, learning_rate=2e-3, per_device_train_batch_size=16,
    report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.remove_callback(PrinterCallback)
_ = trainer.train()
model.eval().save_pretrained("adapter")

# %% [markdown]
# ## A posterior, without training
#
# `from_peft` puts a Laplace approximation around the adapter's weights and the last linear layer.
# The rows it was trained on give the curvature. Rows that it has not seen, 200 of them, choose how
# wide the posterior is, and a scale of the logits. For comparison, `point` is the adapter as it is.

# %%
point = bh.from_peft(model, tokenizer=tokenizer)
posterior = bh.from_peft(model, movies.train, validation=movies.validation, tokenizer=tokenizer)
print(posterior.report)

# %% [markdown]
# The mean of the logits is the adapter's times the output scale. So with two classes, as here,
# both predict the same. What changes is how sure they are: the negative log likelihood (NLL)
# punishes wrong answers given with confidence, and the expected calibration error (ECE) is the gap
# between confidence and accuracy.

# %%
before, after = point.predict(movies.test), posterior.predict(movies.test)
for name, each in (("adapter", point), ("posterior", posterior)):
    scores = each.evaluate(movies.test)
    print(f"{name:10}", *(f"{key} {scores[key]:.3f}  " for key in ("accuracy", "nll", "ece")))

# %%
figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained", sharey=True)
for ax, name, each in zip(axes, ("adapter", "posterior"), (before, after), strict=True):
    plots.reliability(each, ax=ax)
    ax.set_title(name)

# %% [markdown]
# ## A threshold
#
# Suppose a person can read one text in five. On the held-out rows we find the uncertainty that a
# fifth of them exceed, and keep it as the threshold. New texts above it go to the person; their
# share can differ from a fifth.

# %%
threshold = posterior.predict(movies.validation).total.quantile(0.8)


def decide(name, forecast):
    sure = forecast.total <= threshold
    right = forecast.label == forecast.observed()
    print(f"{name:8} {1 - sure.double().mean():.0%} go to a person; of the others ", end="")
    print(f"{right[sure].double().mean():.1%} are right (of all: {right.double().mean():.1%})")


decide("films", after)
others = posterior.predict(tweets.test)
decide("tweets", others)

# %% [markdown]
# Tweets are another kind of text. The area under the ROC curve (AUROC) says how well the epistemic
# uncertainty tells tweets from film reviews: 0.5 is chance. Read it before you trust the threshold
# with texts unlike the training data: a posterior over a small adapter may notice little.

# %%
print(f"AUROC {ood_auroc(after, others, by='epistemic'):.2f}")
for i in after.flag(0.01).tolist():
    said, truth = LABELS[int(after.label[i])], LABELS[int(after.labels[i])]
    print(f"{said} ({after.confidence[i]:.2f}), in truth {truth} | {after.texts[i]}")

# %% [markdown]
# ## New data, and back to peft
#
# The posterior from the films is the prior for the tweets, so that less of the films is forgotten.
# `to_peft` writes the mean of the result as an ordinary adapter, with the last layer.

# %%
later = posterior.update(tweets.train, validation=tweets.validation, epochs=epochs, progress=False)
for name, each in (("before", posterior), ("after", later)):
    scores = [each.evaluate(data.test)["accuracy"] for data in (movies, tweets)]
    print(f"{name:8} accuracy: films {scores[0]:.3f}, tweets {scores[1]:.3f}")

later.to_peft("later")
again = PeftModel.from_pretrained(plain_classifier(), "later").eval()
batch = tokenizer(tweets.test["text"][:8], return_tensors="pt", padding=True)
with torch.no_grad():
    logits = again(**batch).logits
own = later.predict(tweets.test["text"][:8], samples=0).probabilities
print(f"largest difference of a probability: {(logits.softmax(-1) - own).abs().max():.0e}")

# %% [markdown]
# A server that wants no adapter at all gets a plain model: LoRA is merged into the weights.

# %%
plain = later.merge()
plain.save_pretrained("plain")
print(type(plain).__name__, plain.config.id2label)
