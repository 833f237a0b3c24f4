# %% [markdown]
# # 1. The three stages
#
# Learning from human feedback has three stages:
#
# 1. **SFT**: a language model learns to imitate what people wrote.
# 2. **Reward model**: people compare two answers; a second model learns to give the better one a higher score.
# 3. **PPO**: the language model writes answers of its own and changes so that their score rises, without going too far from
#    the SFT model.
#
# This notebook runs all three on a help desk that we make up here, so nothing is downloaded and the whole takes a
# minute or two on one CPU core. Because we made the help desk, we know what its customers like, and can check whether
# the last stage gave them more of it. With a real model and real data the calls are the same; only the first two
# sections change.

# %%
import logging
import random
import shutil
import warnings
from pathlib import Path

import datasets
import lightning as L
import torch
import transformers
from IPython.display import HTML
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf import PPO, SFT, ExportHF, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # a notebook that is committed should print little
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", module="lightning")

RUNS = Path("runs/01_three_stages")
shutil.rmtree(RUNS, ignore_errors=True)
_ = L.seed_everything(0, verbose=False)  # the one seed: data order, weights of new heads and sampling all follow from it

# %% [markdown]
# ## The data: lists of dictionaries
#
# A customer asks about one of six things. The staff have habits: some are polite, some are rude, some ramble, and one
# answer in four is about the wrong thing. `liking` is what customers like. No model ever sees it; it only decides which
# of two replies the customers prefer, and at the end it tells us how well we did.

# %%
ANSWERS = {
    "parcel": "your parcel comes on monday.",
    "password": "please use the reset link.",
    "refund": "we send the money back.",
    "invoice": "it is in your account.",
    "address": "change it in the settings.",
    "visit": "we are open from nine.",
}
QUESTIONS = ("I have a question about my {}.", "Can you help me with the {}?", "It is about the {} again.", "My {} is a problem.")
OPENINGS = {"Hello,": 0.5, "Thank you for writing,": 1.0, "Well,": 0.0, "What now?": -1.0}
CLOSINGS = {"": 0.0, "Have a good day.": 0.5, "Do not write again.": -1.0, "As we said before, this is in the rules.": -0.5}


def question(rng):
    topic = rng.choice(list(ANSWERS))
    return topic, f"Customer: {rng.choice(QUESTIONS).format(topic)}\nReply:"


def reply(topic, rng):
    topic = topic if rng.random() < 0.75 else rng.choice(list(ANSWERS))
    return " " + " ".join(filter(None, (rng.choice(list(OPENINGS)), ANSWERS[topic], rng.choice(list(CLOSINGS)))))


def liking(prompts, replies):
    """+2 for the right answer (-1 for none or another), what opening and closing are worth, and -0.1 per word beyond ten."""
    worth = []
    for prompt, text in zip(prompts, replies, strict=True):
        topic = next(t for t in ANSWERS if t in prompt)
        found = [t for t, answer in ANSWERS.items() if answer in text]
        value = 2.0 if found == [topic] else -1.0
        value += sum(w for phrase, w in (OPENINGS | CLOSINGS).items() if phrase and phrase in text)
        worth.append(value - 0.1 * max(0, len(text.split()) - 10))
    return worth


def demonstration(rng):
    topic, prompt = question(rng)
    return {"prompt": prompt, "label": reply(topic, rng)}


def comparison(rng):
    topic, prompt = question(rng)
    while True:
        a, b = reply(topic, rng), reply(topic, rng)
        worth_a, worth_b = liking([prompt] * 2, [a, b])
        if a != b:
            break
    a_wins = rng.random() < 1 / (1 + 2.718 ** (worth_b - worth_a))  # customers are not always sure
    return {"prompt": prompt, "chosen": a if a_wins else b, "rejected": b if a_wins else a}


rng = random.Random(0)
demonstrations = [demonstration(rng) for _ in range(1600)]
comparisons = [comparison(rng) for _ in range(1600)]
held_out = datasets.Dataset.from_list([demonstration(rng) for _ in range(128)])  # a list or a datasets.Dataset: both are read
held_out_comparisons = [comparison(rng) for _ in range(256)]
demonstrations[0], comparisons[0]

# %% [markdown]
# ## The model: any Hugging Face directory
#
# A model is given by its directory or its name on the hub. Here we make a directory: a tokenizer trained on the texts,
# and a Llama of two layers with random weights. The tokenizer has an end-of-text token. It must, or no reply could end.

# %%
from lit_rlhf.quickstart.model import train_tokenizer, write_untrained  # noqa: E402

tokenizer = train_tokenizer(row["prompt"] + row["label"] for row in demonstrations)
write_untrained(RUNS / "untrained", tokenizer, seed=0)
sorted(path.name for path in (RUNS / "untrained").iterdir())


# %% [markdown]
# ## The Trainer: Lightning's own
#
# The three stages are three LightningModules. You train them with the `Trainer` that you know: precision, devices,
# clipping, accumulation, loggers and checkpoints are its arguments. We write metrics to a CSV file, to draw curves from
# it. Without `logger=` you get TensorBoard. `ExportHF` writes a plain Hugging Face directory at the end, which is what
# the next stage starts from.


# %%
def trainer(stage, **settings):
    return L.Trainer(
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[ExportHF(str(RUNS / stage))],
        logger=CSVLogger(RUNS / "logs", name=stage, version=0),
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,  # leave this out at home
        enable_model_summary=False,
        **settings,
    )


# %% [markdown]
# ## Stage 1: SFT
#
# The loss counts the tokens of the reply, its end included, and not those of the question. Validation writes replies
# for held-out questions and compares them with what the staff wrote (ROUGE).
#
# The learning rate is high because this model begins from nothing. The defaults (AdamW at 3e-6, cosine) are for a model
# that can already write.

# %%
sft = SFT(
    str(RUNS / "untrained"),
    sampling=Sampling(max_new_tokens=32, temperature=0.0),  # how validation writes: greedy
    optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3),
    scheduler=Schedule("cosine", warmup_steps=5),
)
sft_data = SFTDataModule(demonstrations, val_data=held_out, batch_size=32, val_batch_size=128)
trainer("sft", max_epochs=2).fit(sft, sft_data)

{name: round(float(value), 3) for name, value in sft.trainer.callback_metrics.items() if name.startswith("val/")}

# %%
sft.samples[0]

# %% [markdown]
# ## Stage 2: the reward model
#
# It starts from the SFT model and gets a head with one number. The loss is −log σ(score of the preferred − score of the
# other). The accuracy on held-out comparisons says how often the preferred reply has the higher score. It cannot reach
# 1, because the customers themselves are not always sure.

# %%
reward = PairwiseReward(
    str(RUNS / "sft"), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), scheduler=Schedule("cosine", warmup_steps=5)
)
reward_data = PairwiseDataModule(comparisons, val_data=held_out_comparisons, batch_size=32, val_batch_size=128)
trainer("reward", max_epochs=2).fit(reward, reward_data)

{name: round(float(value), 3) for name, value in reward.trainer.callback_metrics.items() if name.startswith("val/")}

# %% [markdown]
# ## Stage 3: PPO
#
# Four networks now: the policy and its frozen reference (both begin as the SFT model), the reward model, and a value
# network (begins as the reward model). One epoch of the Trainer is one iteration: sample `batch_size` replies, score
# them, then take `ppo_epochs × minibatches` optimiser steps on them.
#
# `kl_coef` is the price of leaving the reference, per nat. Without a price the policy finds texts that the reward model
# scores high and that no customer likes.

# %%
ppo = PPO(
    str(RUNS / "sft"),
    reward_model=str(RUNS / "reward"),
    sampling=Sampling(max_new_tokens=32, temperature=0.7),
    batch_size=64,
    ppo_epochs=2,
    kl_coef=0.1,
    optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4, eps=1e-5),
)
ppo_data = PromptDataModule(demonstrations, val_data=held_out, val_batch_size=128)


def mean_liking(samples):
    worth = liking([s["prompt"] for s in samples], [s["response"] for s in samples])
    return sum(worth) / len(worth)


ppo_trainer = trainer("ppo", max_epochs=20, check_val_every_n_epoch=20)
ppo_trainer.validate(ppo, ppo_data, verbose=False)  # before: the SFT model at PPO's temperature
before = ppo.samples
ppo_trainer.fit(ppo, ppo_data)
after = ppo.samples
print(f"customers' liking, {len(before)} held-out questions: SFT {mean_liking(before):.2f}, PPO {mean_liking(after):.2f}")


# %% [markdown]
# ## Curves
#
# What to look at first: the score should rise, the KL (nats per reply, from the reference) should rise slowly and then
# stay, the length should not run away, and nearly all replies should end (EOS rate). [metrics.md](metrics.md) explains
# every number that is logged.


# %%
def read_csv(stage):
    import csv

    with open(RUNS / "logs" / stage / "version_0" / "metrics.csv") as file:
        return list(csv.DictReader(file))


def curve(rows, name, width=230, height=90):
    """One metric as an inline SVG."""
    ys = [float(row[name]) for row in rows if row.get(name)]
    low, high = min(ys), max(max(ys), min(ys) + 1e-9)
    xs = [5 + i * (width - 10) / max(len(ys) - 1, 1) for i in range(len(ys))]
    points = " ".join(f"{x:.1f},{height - 5 - (y - low) / (high - low) * (height - 30):.1f}" for x, y in zip(xs, ys, strict=True))
    title = f'<text x="5" y="14" font-size="11">{name}: {ys[0]:.2f} to {ys[-1]:.2f}</text>'
    line = f'<polyline points="{points}" fill="none" stroke="#36c" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" style="background:#fff">{title}{line}</svg>'


wanted = {
    "sft": ["train/loss"],
    "reward": ["train/loss", "train/accuracy"],
    "ppo": ["rollout/score", "rollout/kl", "rollout/length", "rollout/eos_rate", "rollout/entropy", "ppo/value_loss"],
}
HTML("".join(f"<p>{stage}<br>" + "".join(curve(read_csv(stage), name) for name in names) + "</p>" for stage, names in wanted.items()))

# %% [markdown]
# ## Replies side by side

# %%
cells = "".join(
    f"<tr><td>{b['prompt'].splitlines()[0]}</td><td>{b['response']}</td><td>{a['response']}</td><td>{a['score']:.2f}</td><td>{a['kl']:.2f}</td></tr>"
    for b, a in zip(before[:8], after[:8], strict=True)
)
HTML(f"<table><tr><th>question</th><th>SFT</th><th>PPO</th><th>score</th><th>KL</th></tr>{cells}</table>")

# %% [markdown]
# ## The exported directories are plain Hugging Face models
#
# `ppo/policy` is a causal language model and `reward` a sequence classifier with one label. Nothing of lit_rlhf is
# needed to use them. (Prompt and reply are tokenised apart, so a reward model reads prompt + reply + end of text. Our
# scores are its number minus `config.reward_mean`, the mean over replies of the staff.)

# %%
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

policy = AutoModelForCausalLM.from_pretrained(RUNS / "ppo" / "policy")
judge = AutoModelForSequenceClassification.from_pretrained(RUNS / "reward")
tokenizer = AutoTokenizer.from_pretrained(RUNS / "ppo" / "policy")

prompt = "Customer: My invoice is a problem.\nReply:"
ids = tokenizer(prompt, return_tensors="pt").input_ids
written = policy.generate(ids, max_new_tokens=32, do_sample=False)
with torch.no_grad():
    score = judge(written).logits.item() - judge.config.reward_mean
print(tokenizer.decode(written[0], skip_special_tokens=True))
print(f"score {score:.2f}")

# %% [markdown]
# ## From here
#
# * The same three runs from the command line: `lit-rlhf fit --config configs/local/sft.yaml`, then `reward.yaml` and `ppo.yaml`, with your
#   directory and your files in place of ours.
# * A reward that is a function and not a model: [02_your_own_reward](02_your_own_reward.ipynb).
# * More devices: [03_strategies](03_strategies.ipynb).
