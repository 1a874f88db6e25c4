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
# # Answering and labelling: from a CSV file to a promise
#
# A service should say whether a tweet is positive or negative. It answers by itself where it is
# good enough, and leaves the other tweets to people. We fit a posterior to 200 tweets in a CSV
# file, promise that at most 5 % of its answers are wrong, see whether the promise is kept and when
# it is not, and choose the tweets to label next.
#
# Only the head, a linear layer on the frozen MiniLM, is random here, so everything takes three
# minutes. With other presets all calls stay the same.

# %%
import logging
import os
import sys
import warnings

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress")
logging.getLogger("transformers").setLevel(logging.ERROR)

import pandas as pd
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.decisions.watching import Watch

sys.path.insert(0, "..")  # the repository: its tools fetch the data
from tools.sentiment import LABELS, sentiment, two_rounds

# BHPEFT_SMALL=1 checks in a minute that everything runs; the numbers are then meaningless.
small = os.environ.get("BHPEFT_SMALL") == "1"
train, calibration, new, films = (40, 120, 120, 60) if small else (200, 600, 1500, 300)
error, labels = (0.3, 5) if small else (0.05, 50)

# %% [markdown]
# ## The files
#
# Three files of tweets, drawn at random: one to learn, one to set the promise on, and one to
# predict. The last one has labels too, which a service would not have; we use them to check.

# %%
movies, tweets = two_rounds(sentiment(), (films, train), calibration, new, seed=0)
files = {"train": tweets.train, "calibration": tweets.validation, "new": tweets.test}
for name, rows in files.items():
    texts, names = rows["text"], [LABELS[label] for label in rows["label"]]
    pd.DataFrame({"text": texts, "label": names}).to_csv(f"{name}.csv", index=False)
pd.read_csv("train.csv").head(3)

# %%
model = bh.tasks.categories(AutoModel.from_pretrained(minilm()), 2, kinds=bh.presets.head_only())
columns = bh.Columns(label_names=LABELS)
posterior = bh.fit(model, "laplace", "train.csv", columns=columns, progress=False)
print(posterior.report.score)

# %% [markdown]
# ## The promise
#
# `promise` orders the calibration tweets by the probability that the answer is right, and lowers
# the threshold as long as an exact test says that at most 5 % of the answers above it are wrong.
# It prints what exactly is promised.

# %%
posterior = posterior.promise("calibration.csv", error=error)
print(posterior.promised)

# %% [markdown]
# Is it kept? Here we know the labels of the new tweets.

# %%
forecast = posterior.predict("new.csv")
answered, wrong = forecast.answered, forecast.wrong()
print(f"answered:            {answered.float().mean():.1%} of {len(forecast)} new tweets")
print(f"wrong among these:   {wrong[answered].float().mean():.1%}")
print(f"wrong among all:     {wrong.float().mean():.1%}")

# %% [markdown]
# It is kept for nine of ten draws of calibration rows, and on average the error is lower than what
# is promised. On any finite number of new tweets the observed share also varies around the true
# one.
#
# The other way round: if people can look at 30 % of the tweets, which error can be promised?

# %%
print(str(posterior.promise("calibration.csv", max_share_to_people=0.3).promised).splitlines()[0])

# %% [markdown]
# ## Watching
#
# The promise is for tweets. What if sentences of film reviews come instead? `Watch` counts wrong
# answers as labels come in. You may ask it as often as you like: the probability that there is ever
# a false alarm is 5 %.

# %%
print(Watch(posterior.promised).see(forecast), end="\n\n")
print(Watch(posterior.promised).see(posterior.predict(movies.train)))

# %% [markdown]
# ## What to label next
#
# People label some of the tweets. `queue` chooses those whose labels, all together, say most about
# the labels of all tweets, and gives a reason for each.

# %%
half = len(tweets.test) // 2
queue = posterior.queue(tweets.test["text"][:half], labels)
for text, reason in [*zip(queue.texts, queue.reasons, strict=True)][:5]:
    print(f"{reason}\n    {text[:90]}")

# %% [markdown]
# Somebody labels them, and the posterior learns them. A promise ends with its round: the next one
# needs a promise of its own. The calibration tweets have not been learnt, so we use them again.
# (The tweets of the queue cannot be used for this: they are no random sample.)

# %%
labelled = {
    "text": list(queue.texts),
    "label": [LABELS[tweets.test["label"][i]] for i in queue.rows.tolist()],
}
after = posterior.update(labelled, progress=False)
print("promise after the update:", after.promised)
after = after.promise("calibration.csv", error=error)
rest = tweets.test.select(range(half, len(tweets.test)))
for name, one in {"before": posterior, "after": after}.items():
    forecast = one.predict(rest)
    answered, wrong = forecast.answered, forecast.wrong()
    shares = 1 - wrong.float().mean(), answered.float().mean(), wrong[answered].float().mean()
    print("{:6}  accuracy {:.1%}, answered {:.1%}, wrong among these {:.1%}".format(name, *shares))
after.save("run")

# %% [markdown]
# On the command line the same is
#
# ```
# bhpeft fit train.csv --backbone minilm --preset head_only --out run
# bhpeft promise run calibration.csv
# bhpeft predict run new.csv
# bhpeft review run new.csv --out labels.csv
# bhpeft update run labels.csv --out run-2
# ```
#
# `review` opens a page in which people label each text of the queue with one key, and `bhpeft serve
# run` answers tweets over HTTP and watches the promise as labels come back. The page "Decisions" in
# the documentation has the details, and what all of this saves on 14 weeks of news.
