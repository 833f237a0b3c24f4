# %% [markdown]
# # 4. Policy gradient from scratch
#
# PPO looks like a pile of tricks. It is four steps from one line of calculus, and each step answers a fault of the one
# before. What a step buys is in its curve, also where it buys nothing. We take them one by one on the made-up forum of
# `lit-rlhf quickstart`, where the gold reward of a summary is known exactly: +1 for each of the post's five facts that
# it states, minus for false ones and for filler. No reward model stands between, so whatever goes wrong is the policy
# gradient's own doing.
#
# Every step is a few lines on `lit_rlhf.functional`. The whole takes about three minutes on one CPU core.

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
from torch import Tensor

from lit_rlhf import SFT, ExportHF, Sampling, Schedule, SFTDataModule
from lit_rlhf.batch import Batch
from lit_rlhf.data.text import format_tldr
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.functional import gae, grouped_mean, k1, leave_one_out, masked_mean, policy_loss, token_rewards, value_loss, whiten
from lit_rlhf.generation import sample
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.quickstart.model import train_tokenizer, write_untrained
from lit_rlhf.quickstart.world import gold, raw_row
from lit_rlhf.report import Plot, Series, smoothed
from lit_rlhf.report.svg import standalone

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", module="lightning")

RUNS = Path("runs/04_policy_gradient")
shutil.rmtree(RUNS, ignore_errors=True)
_ = L.seed_everything(0, verbose=False)

# %% [markdown]
# ## Where we begin: a policy that imitates
#
# People summarise posts; some forget facts, some ramble. A Llama of two layers learns to write as they do. This is
# stage 1 of the quickstart with two thirds of its data.

# %%
rng = random.Random(0)
rows = [raw_row(rng) for _ in range(9600)]


def prompt_of(row):
    return format_tldr(row["subreddit"], row["title"], row["post"])


tokenizer = train_tokenizer(text for row in rows[:2000] for text in (prompt_of(row), " " + row["summary"]))
write_untrained(RUNS / "untrained", tokenizer, seed=0)
sft = SFT(
    str(RUNS / "untrained"),
    optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3, betas=(0.9, 0.95)),
    scheduler=Schedule("cosine", warmup_steps=20, final=0.1),
)
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=1,
    gradient_clip_val=1.0,
    callbacks=[ExportHF(str(RUNS / "sft"))],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(sft, SFTDataModule(rows, batch_size=32))
START = str(RUNS / "sft")

# %% [markdown]
# ## The log-derivative
#
# A policy $p_\theta$ chooses $a$ and earns $R(a)$. We want the gradient of what it earns on average,
# $J(\theta) = \sum_a p_\theta(a) R(a)$. The sum runs over every possible summary; nobody can write it out. But
# $\nabla p = p \, \nabla \log p$, so
#
# $$\nabla J = \sum_a \nabla p_\theta(a) \, R(a) = \sum_a p_\theta(a) \, R(a) \nabla \log p_\theta(a)
# = \mathbb{E}\left[R(a) \nabla \log p_\theta(a)\right],$$
#
# and an expectation can be sampled. The reward may be anything: it is never differentiated.
#
# For one token the sum *can* be written out. Take a post and a person's summary, and let the policy choose its first
# token alone: some 700 choices, each worth the gold reward of what results. The exact gradient (with respect to the
# logits) is then there to compare with. The estimate is the gradient of `mean(R * log p)` over n samples.
#
# And nothing changes if we subtract a constant $b$ from the reward, since $\sum_a \nabla p(a) = \nabla 1 = 0$. Nothing
# but the noise: with $b = J$ it takes far fewer samples to be as close.

# %%
policy = CausalPolicy.load(START).eval()
encoder = Encoder(policy.tokenizer)
post, tokens = prompt_of(rows[0]), policy.tokenizer(" " + rows[0]["summary"]).input_ids
with torch.no_grad():
    logits = policy.lm(torch.tensor([encoder.prompt(encoder.ids([post])[0])])).logits[0, -1]
summaries = policy.tokenizer.batch_decode([[first, *tokens[1:]] for first in range(len(logits))])
worth = torch.tensor(gold([post] * len(summaries), summaries))

logits = logits.detach().requires_grad_()
J = (logits.softmax(0) * worth).sum()
(exact,) = torch.autograd.grad(J, logits)


def error(n, baseline, generator):
    """How far an estimate from n samples is from the exact gradient, as a share of the latter's length."""
    chosen = torch.multinomial(logits.detach().softmax(0), n, replacement=True, generator=generator)
    (estimate,) = torch.autograd.grad(((worth[chosen] - baseline) * logits.log_softmax(0)[chosen]).mean(), logits)
    return float((estimate - exact).norm() / exact.norm())


counts = [100, 1000, 10_000, 100_000]
generator = torch.Generator().manual_seed(0)
errors = {
    name: [sum(error(n, b, generator) for _ in range(20)) / 20 for n in counts]
    for name, b in {"R": 0.0, "R - J": float(J.detach())}.items()
}


def draw(*plots):
    return HTML("".join(f"<span style='display:inline-block'>{standalone(plot)}</span>" for plot in plots))


draw(
    Plot(
        "Distance to the exact gradient",
        "samples",
        "share of the gradient's length",
        [Series(k, counts, v) for k, v in errors.items()],
        x_log=True,
    )
)

# %% [markdown]
# ## Sampling summaries
#
# A summary is a row of such choices, and $\log p$ of the whole is the sum over its tokens. `sample` draws summaries (its
# noise is a function of the key, so a run repeats exactly), and the policy's forward gives each token's log-probability.
# Each iteration below draws 4 summaries for each of 24 new posts. All five methods see the same posts, with the same
# noise, and use as many summaries.

# %%
ITERATIONS, POSTS, EACH = 20, 24, 4
SAMPLING = Sampling(max_new_tokens=40, temperature=1.0)
held_out = [prompt_of(raw_row(rng)) for _ in range(200)]
unseen = [prompt_of(raw_row(rng)) for _ in range(ITERATIONS * POSTS)]
reference = CausalPolicy.load(START).eval().requires_grad_(False)


@torch.no_grad()
def write(policy, prompts, each, key):
    """Summaries of these posts, as a batch, with the log-probs of their tokens under policy and reference, and their gold rewards."""
    made = sample(policy, Batch.of([encoder.prompt(ids) for ids in encoder.ids(prompts)]), SAMPLING, num_responses=each, key=key)
    scores = torch.tensor(gold([prompts[m] for m in made.batch.prompt_of.tolist()], made.texts))
    return made.batch, logprobs_of(policy, made.batch), logprobs_of(reference, made.batch), scores


def logprobs_of(network, batch) -> Tensor:
    return network(batch, temperature=SAMPLING.temperature, ban=True)[0]


def learn(update, lr=3e-4, seed=0):
    """Begins at SFT, calls `update(policy, step, iteration's summaries)`, and returns the curve and the gold of each held-out post."""
    policy, curve = CausalPolicy.load(START), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, eps=1e-5)

    def step(loss, also=()):
        """One step down this loss; a critic in `also` takes its own with it."""
        for x in (optimizer, *also):
            x.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for x in (optimizer, *also):
            x.step()

    for it in range(ITERATIONS):
        made = write(policy, unseen[it * POSTS : (it + 1) * POSTS], EACH, (seed, it))
        curve.append({"gold": float(made[3].mean()), "kl": float((k1(made[1], made[2]) * made[0].response_mask).sum(1).mean())})
        update(policy, step, *made)
    *_, scores = write(policy, held_out, 1, (seed, 1000))
    return curve, scores


*_, before = write(reference, held_out, 1, (0, 1000))
runs = {}
round(float(before.mean()), 2)

# %% [markdown]
# ## Step 1: REINFORCE
#
# The estimate above, word for word (Williams 1992): every token of a summary is pushed up by the summary's reward. And
# a second time with 5 added to every reward, as if gold had been counted from 0 to 10 and not from -5 to 5. The best
# summaries are still the best, and on average the gradient is the same; only the noise is not.


# %%
def reinforce(plus):
    def update(policy, step, batch, old, ref, scores):
        step(-masked_mean((scores + plus)[:, None] * logprobs_of(policy, batch), batch.response_mask))

    return update


def show(*names):
    """Gold reward and KL of what the policies wrote, by summaries used."""
    used = [POSTS * EACH * (i + 1) for i in range(ITERATIONS)]
    plots = [
        Plot(title, "summaries", unit, [Series(n, used, [y for _, y in smoothed([(0, c[key]) for c in runs[n][0]], 3)]) for n in names])
        for key, title, unit in (("gold", "Gold reward", "mean of 3 iterations"), ("kl", "KL to SFT", "nats per summary"))
    ]
    for name in names:
        gain = grouped_mean(runs[name][1] - before)
        print(f"{name}: gold {runs[name][1].mean():.2f} on held-out posts, {gain.mean:+.2f} ± {gain.error:.2f} from SFT")
    return draw(*plots)


runs["REINFORCE"] = learn(reinforce(plus=0))
runs["REINFORCE, gold + 5"] = learn(reinforce(plus=5))
show("REINFORCE", "REINFORCE, gold + 5")

# %% [markdown]
# ## Step 2: a baseline
#
# A reward above 0 pushes a summary up, whether it was good or poor; where all are above 0, all are pushed up, good ones
# a little more, and what the policy learns is what is left over after all that pushing. Subtract what *other* summaries
# of the same post earn: the mean of the other three (a baseline must not depend on the summary itself, or the mean of
# the gradient changes). That is RLOO (Ahmadian et al. 2024), and adding 5 now changes nothing at all.


# %%
def with_baseline(policy, step, batch, old, ref, scores):
    step(-masked_mean(leave_one_out(scores, EACH)[:, None] * logprobs_of(policy, batch), batch.response_mask))


runs["baseline"] = learn(with_baseline)
show("REINFORCE", "REINFORCE, gold + 5", "baseline")

# %% [markdown]
# ## Step 3: which token was it? A critic, and the price of leaving SFT
#
# The score comes at the end, and all tokens share it. A *value network* learns what to expect after each token. How the
# expectation changes from one token to the next, $\delta_t = r_t + V_{t+1} - V_t$, says what that token was worth; `gae`
# sums the changes that follow with weight $\lambda^k$. At the same time every token pays for leaving the reference:
# `token_rewards` is $-\beta \, (\log p - \log p_{ref})$, plus the score on the last token.
#
# With one step for each batch, and summaries of some fifteen tokens, this is worth no more than the baseline was.

# %%
KL_COEF = 0.02


class Critic:
    """A value network on the SFT model, which expects SFT's own average of every state to begin with, and its optimiser."""

    def __init__(self):
        self.network = ScalarModel.load(START, head="zero")
        self.network.set_mean(-float(before.mean()))  # what is subtracted from its numbers
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)

    def values(self, batch):
        return self.network(batch)[:, :-1] * batch.response_mask


def advantages_of(critic, batch, old, ref, scores):
    """Whitened advantages, and what the critic should have said."""
    with torch.no_grad():
        values = critic.values(batch)
    rewards = token_rewards(old, ref, scores, batch.response_mask, kl_coef=KL_COEF)
    advantages, returns = gae(rewards, values, batch.response_mask, lam=0.95)
    return whiten(advantages, batch.response_mask), returns, values


critic = Critic()


def with_critic(policy, step, batch, old, ref, scores):
    mask = batch.response_mask
    advantages, returns, values = advantages_of(critic, batch, old, ref, scores)
    wrong, _ = value_loss(critic.values(batch), values, returns, mask, clip=None)
    step(-masked_mean(advantages * logprobs_of(policy, batch), mask) + wrong, also=[critic.optimizer])


runs["critic"] = learn(with_critic)
show("baseline", "critic")

# %% [markdown]
# ## Step 4: use each summary more than once
#
# Writing summaries is what costs. Why one step per batch? After the first step the samples come from a policy that is
# no more: the mean must be reweighted by $\rho = p_{new} / p_{old}$. That is right on average, but a $\rho$ far from 1
# makes a few tokens count for all, and nothing holds the policy back. PPO (Schulman et al. 2017) takes the worse of
# $\rho A$ and $\mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A$: beyond the clip there is nothing more to gain from
# these samples. `policy_loss` is that; a huge `clip` leaves the reweighting alone.

# %%
EPOCHS, MINIBATCHES = 4, 4
deviations = {}


def several_epochs(name, clip):
    """The update of step 3, with `EPOCHS` passes of `MINIBATCHES` steps each over the same summaries."""
    critic, deviations[name] = Critic(), []

    def update(policy, step, batch, old, ref, scores):
        advantages, returns, values = advantages_of(critic, batch, old, ref, scores)
        for _ in range(EPOCHS):
            for posts in torch.randperm(POSTS).chunk(MINIBATCHES):
                rows = (posts[:, None] * EACH + torch.arange(EACH)).flatten()  # a post's summaries together: it is read once for all
                part, mask, width = batch.select(rows), batch.response_mask[rows], batch.response_ids[rows].shape[1]
                new = torch.nn.functional.pad(logprobs_of(policy, part), (0, width - part.response_mask.shape[1]))
                seen = torch.nn.functional.pad(critic.values(part), (0, width - part.response_mask.shape[1]))
                loss, stats = policy_loss(new, old[rows], advantages[rows], mask, clip=clip)
                wrong, _ = value_loss(seen, values[rows], returns[rows], mask, clip=None)
                step(loss + wrong, also=[critic.optimizer])
        deviations[name].append(float(stats["ratio_max_dev"]))

    return update


for name, clip in (("no clip", 1e9), ("PPO", 0.2)):
    torch.manual_seed(0)
    runs[name] = learn(several_epochs(name, clip))
show("critic", "no clip", "PPO")

# %% [markdown]
# ## All of it
#
# The same posts, the same number of summaries; ± is one standard error over the held-out posts, of one seed. REINFORCE
# learns, and suffers from a constant that means nothing; the baseline is proof against it. The critic by itself adds
# nothing to the baseline here. Several steps for each batch learn several times as fast, and without the clip they run
# away: see the KL.

# %%
cells = "".join(
    f"<tr><td>{name}</td><td>{scores.mean():.2f}</td><td>{(gain := grouped_mean(scores - before)).mean:+.2f} ± {gain.error:.2f}</td>"
    f"<td>{curve[-1]['kl']:.1f}</td></tr>"
    for name, (curve, scores) in runs.items()
)
HTML(f"<table><tr><th>step</th><th>gold reward</th><th>from SFT</th><th>KL at the end (nats)</th></tr>{cells}</table>")

# %% [markdown]
# ## From here
#
# `PPO` in lit_rlhf is step 4 with what a real run needs around it: a reward model in place of gold, a KL coefficient that
# adapts, any number of devices, exact resume. Its update is `lit_rlhf/modules/ppo.py`, its rollout `lit_rlhf/rollout.py`:
# you will find every line of this notebook there. [01_three_stages](01_three_stages.ipynb) runs it.
