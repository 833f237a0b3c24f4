# %% [markdown]
# # 2. Your own reward function
#
# Not every reward is a model of people's choices. Often you can write it down: a test that passes, a format that fits,
# a length, a classifier that you already have. Then there is no stage 2, and PPO takes a Python function.
#
# We do what trlX's first example does: make a language model write nicer reviews, with their sentiment as the reward.
# First with a lexicon (VADER, a small package from PyPI), then with a `transformers` pipeline.
#
# `pip install "lit-rlhf[notebooks]"` brings the lexicon. Nothing else is downloaded. The whole takes about a minute on
# one CPU core.

# %%
import logging
import os
import random
import shutil
import warnings
from pathlib import Path

import datasets
import lightning as L
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import lit_rlhf
from lit_rlhf import PPO, SFT, ExportHF, PipelineReward, PromptDataModule, Sampling, Schedule, SFTDataModule

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # a notebook that is committed should print little
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", module="lightning")

RUNS = Path("runs/02_your_own_reward")
shutil.rmtree(RUNS, ignore_errors=True)
L.seed_everything(0, verbose=False)


def quiet_trainer(name, **settings):
    plain = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    return L.Trainer(accelerator="cpu", gradient_clip_val=1.0, logger=CSVLogger(RUNS / "logs", name=name, version=0), **plain, **settings)


# %% [markdown]
# ## A small language model
#
# With a hub at hand you would write `MODEL = "HuggingFaceTB/SmolLM2-135M"` or the like and skip this section. (Set
# `TUTORIAL_MODEL` to the directory of a model to do so here. On a CPU that takes longer.) Without one we make up some
# reviews and teach a Llama of two layers to write such reviews: good, bad and indifferent ones alike. The `SFT` module
# does that too; with `prompt_loss=True` the beginning of each review counts in the loss as well.

# %%
BEGINNINGS = [
    f"The {thing} {verb}" for thing in ("movie", "story", "acting", "music", "ending", "camera work") for verb in ("was", "seemed", "is")
]
WORDS = {
    "good": "wonderful great funny brilliant beautiful excellent charming enjoyable amazing lovely".split(),
    "bad": "terrible boring awful stupid horrible ugly disappointing annoying bad weak".split(),
    "flat": "long short loud quiet new old slow fast simple usual".split(),
}


def review(rng):
    """A beginning, the rest, and what its writer thought."""
    mood = rng.choice(list(WORDS))
    words = rng.sample(WORDS[mood], rng.choice((1, 2, 3)))
    end = rng.choice(("", ", and so is the rest", " all the time", ", as my friends say"))
    return {"prompt": rng.choice(BEGINNINGS), "label": " " + " and ".join(words) + end + ".", "mood": mood}


rng = random.Random(0)
reviews = [review(rng) for _ in range(1500)]

MODEL = os.environ.get("TUTORIAL_MODEL", "")
if not MODEL:
    from lit_rlhf.quickstart.model import train_tokenizer, write_untrained

    tokenizer = train_tokenizer(r["prompt"] + r["label"] for r in reviews)
    write_untrained(RUNS / "untrained", tokenizer, seed=0)
    lm = SFT(str(RUNS / "untrained"), optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3), scheduler=Schedule("cosine", warmup_steps=5))
    trainer = quiet_trainer("lm", max_epochs=2, callbacks=[ExportHF(str(RUNS / "lm"))])
    trainer.fit(lm, SFTDataModule(reviews, batch_size=32, prompt_loss=True))
    MODEL = str(RUNS / "lm")
MODEL, reviews[:3]

# %% [markdown]
# ## The reward: a function
#
# It takes the prompts and the responses, as texts, and returns one number for each response. VADER's `compound` goes
# from −1 to 1.

# %%
vader = SentimentIntensityAnalyzer()


def sentiment(prompts, responses):
    return [vader.polarity_scores(prompt + response)["compound"] for prompt, response in zip(prompts, responses, strict=True)]


sentiment(["The movie was"] * 3, [" wonderful and funny.", " long and loud.", " terrible and boring."])

# %% [markdown]
# ## PPO in four lines
#
# A data set with a column `prompt`, a Trainer, a module, `fit`. The defaults of `PPO` are those of a published 1B
# model: 512 responses an iteration and a learning rate of 3e-6. For a model this small we take fewer responses and a
# higher rate.

# %%
SMALL = {
    "sampling": Sampling(max_new_tokens=16, temperature=1.0),
    "batch_size": 64,  # responses per iteration
    "ppo_epochs": 2,  # optimiser steps on them
    "kl_coef": 0.1,  # the price of a nat
    "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-5),
}

dataset = datasets.Dataset.from_list([{"prompt": r["prompt"]} for r in reviews])
trainer = quiet_trainer("lexicon", max_epochs=15)
ppo = PPO(MODEL, reward_fn=sentiment, **SMALL)
trainer.fit(ppo, PromptDataModule(dataset))

# %% [markdown]
# What did it learn? We validate both models on the same prompts. Validation samples at the training temperature, with
# the same noise each time, so the two differ by what was learned and by nothing else.


# %%
def evaluate(module):
    data = PromptDataModule([{"prompt": b} for b in BEGINNINGS], val_data=[{"prompt": b} for b in BEGINNINGS * 4], val_batch_size=72)
    found = quiet_trainer("validation").validate(module, data, verbose=False)[0]
    return {name: round(value, 2) for name, value in found.items()}, module.samples


untouched = PPO(MODEL, reward_fn=sentiment, **SMALL)
before, samples_before = evaluate(untouched)
after, samples_after = evaluate(ppo)
print("before", before)
print("after ", after)
for old, new in zip(samples_before[:6], samples_after[:6], strict=True):
    print(f"{old['prompt']:22} | {old['response']:60} | {new['response']}")

# %% [markdown]
# The score rises, and `val/kl` says what it cost: how many nats a response is away from what the first model would have
# written. Lower `kl_coef` and the score goes higher, until the model writes the same two words for every prompt. That
# is worth trying: it shows what the penalty is for.
#
# ## More columns
#
# A reward may need more than the prompt: a reference, a target, a test. Name a column of the data set in the function's
# signature and you get its values, one for each response.


# %%
def as_wanted(prompts, responses, wanted):
    scores = sentiment(prompts, responses)
    return [score if mood == "good" else -score for score, mood in zip(scores, wanted, strict=True)]


rows = [{"prompt": f"({mood}) {b}", "wanted": mood} for mood in ("good", "bad") for b in BEGINNINGS]
quiet_trainer("columns", max_epochs=1).fit(PPO(MODEL, reward_fn=as_wanted, **SMALL), PromptDataModule(rows))

# %% [markdown]
# ## What goes wrong is said
#
# A reward that raises, returns too few numbers, or NaN stops the run and names the prompt.


# %%
def broken(prompts, responses):
    return [float("nan") for _ in responses]


try:
    quiet_trainer("broken", max_epochs=1).fit(PPO(MODEL, reward_fn=broken, **SMALL), PromptDataModule(dataset))
except ValueError as error:
    print(error)

# %% [markdown]
# ## The one-call form
#
# Who comes from trlX knows `trlx.train(model, reward_fn=f)` with `f(samples)`, where a sample is prompt and response in
# one text. The same works here. `prompts` is a list of texts, or nothing at all: then the model writes from its first
# token on. It returns the trained module. (`trainer=` is there only to keep this page short; leave it out and set
# `iterations=`.)

# %%
trained = lit_rlhf.train(
    MODEL,
    reward_fn=lambda samples: [vader.polarity_scores(text)["compound"] for text in samples],
    prompts=BEGINNINGS,
    settings=SMALL,
    trainer=quiet_trainer("one_call", max_epochs=8),
)
trained.policy.save(RUNS / "nicer")  # a Hugging Face directory
evaluate(trained)[0]

# %% [markdown]
# ## A classifier as the reward
#
# A sentiment classifier from the hub would be `PipelineReward("lvwerra/distilbert-imdb", label="POSITIVE")`, the one of
# trlX's example. Here we train a tiny BERT on the moods of our reviews, in plain PyTorch, and save it as a Hugging Face
# directory.

# %%
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(MODEL)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
config = BertConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=tokenizer.pad_token_id,
    id2label={0: "NEGATIVE", 1: "POSITIVE"},
    label2id={"NEGATIVE": 0, "POSITIVE": 1},
)
torch.manual_seed(0)
classifier = BertForSequenceClassification(config).train()
optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
opinions = [r for r in reviews if r["mood"] != "flat"]
for _ in range(60):
    some = rng.sample(opinions, 32)
    inputs = tokenizer([r["label"] for r in some], padding=True, return_tensors="pt", return_token_type_ids=False)
    loss = classifier(**inputs, labels=torch.tensor([int(r["mood"] == "good") for r in some])).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
classifier.eval().save_pretrained(RUNS / "classifier")
tokenizer.save_pretrained(RUNS / "classifier")
print(f"loss {loss.item():.3f}")
pipeline("text-classification", model=str(RUNS / "classifier"))([" wonderful and funny.", " terrible."])

# %% [markdown]
# `PipelineReward` takes the probability of one label as the score. It reads the response; `with_prompt=True` makes it
# read prompt and response. It loads the classifier on the device of the process that calls it, so it also works on
# several GPUs.

# %%
by_label = PPO(MODEL, reward_fn=PipelineReward(str(RUNS / "classifier"), label="POSITIVE"), **SMALL)
first = evaluate(PPO(MODEL, reward_fn=PipelineReward(str(RUNS / "classifier"), label="POSITIVE"), **SMALL))[0]
quiet_trainer("pipeline", max_epochs=10).fit(by_label, PromptDataModule(dataset))
last = evaluate(by_label)[0]
print("before", first)
print("after ", last)

# %% [markdown]
# A pipeline with **one** label, such as a reward model, can be given as it is; its raw output is the score. (One with
# two labels is refused at once: it has to say which.) We make one from our classifier: the difference of the two
# logits, which is the log-odds of POSITIVE.

# %%
single = BertForSequenceClassification.from_pretrained(
    RUNS / "classifier", num_labels=1, problem_type="regression", ignore_mismatched_sizes=True
)
with torch.no_grad():
    single.classifier.weight.copy_(classifier.classifier.weight[1:] - classifier.classifier.weight[:1])
    single.classifier.bias.copy_(classifier.classifier.bias[1:] - classifier.classifier.bias[:1])
pipe = pipeline("text-classification", model=single.eval(), tokenizer=tokenizer, device="cpu")

directly = PPO(MODEL, reward_fn=pipe, **(SMALL | {"kl_coef": 0.3}))  # log-odds have larger units than probabilities, so a nat costs more
quiet_trainer("directly", max_epochs=10).fit(directly, PromptDataModule(dataset))
odds_before, odds_after = evaluate(PPO(MODEL, reward_fn=pipe, **SMALL))[0], evaluate(directly)[0]
print("before", odds_before)
print("after ", odds_after)

# %% [markdown]
# ## In YAML
#
# On the command line a function is given by its import path, and a configured object like any other:
#
# ```yaml
# model:
#   class_path: PPO
#   init_args:
#     model: my/sft/hf
#     reward_fn: my_package.rewards.sentiment
# ```
#
# ```yaml
#     reward_fn:
#       class_path: lit_rlhf.PipelineReward
#       init_args: {model: lvwerra/distilbert-imdb, label: POSITIVE}
# ```
