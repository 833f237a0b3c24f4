"""Checks of the SFT model as PPO's starting point, and of the policy that PPO left."""

import torch

from lit_rlhf.collapse import SIGNS, signs
from lit_rlhf.doctor.case import Case
from lit_rlhf.doctor.finding import Finding, NotMeasurable, judge
from lit_rlhf.functional import grouped_mean, grouped_share, k1
from lit_rlhf.rollout import Rollout


def kl(case: Case) -> Finding:
    """KL is 0 at step 0, within 1e-3 nats a response in float32: policy and reference are the same weights read the same way."""
    made = case.rollout
    per_token = (k1(made.logprobs, made.ref_logprobs).abs() * made.batch.response_mask).sum(1)
    worst, limit = float(per_token.max()), 1e-3 if case.dtype == "float32" else 0.5
    return judge(
        "kl",
        f"{worst:.2g} nats in the worst of {len(per_token)} responses",
        f"at most {limit:g} nats at step 0",
        fail=not worst <= limit,
        reason="policy and reference disagree before anything was learnt: dropout is on, or one of them is read another way",
        remedy="switch dropout off (CausalPolicy.load does), load both from the same directory in the same precision",
        numbers={"kl_max": worst},
    )


@torch.no_grad()
def ratio(case: Case) -> Finding:
    """The ratio of the first minibatch is 1, within 1%: sampling, the rollout's pass and the update's pass give a token the same log-prob.

    Sampling reads left-padded prompts with a cache, the rollout packs rows, the update packs them anew in training mode. What is off in one
    of the three (dropout, position ids, temperature, a mask) shows here; float32 leaves about 1e-5, bfloat16 a few per cent.
    """
    made, temperature = case.rollout, case.sampling.temperature or 1.0
    rows = list(range(0, made.batch.num_responses, 2))
    batch = made.batch.select(rows).to(case.device)
    fresh = case.policy_net(batch, temperature=temperature, ban=True)[0].float().cpu()
    mask, width = batch.response_mask.cpu(), fresh.shape[1]
    old, sampled = made.logprobs[rows, :width], made.sampled_logprobs[rows, :width]
    update, rollout = (float(((a - b).exp() - 1).abs()[mask].max()) for a, b in ((fresh, old), (old, sampled)))
    worst, limit = max(update, rollout), 0.01 if case.dtype == "float32" else 0.2
    return judge(
        "ratio",
        f"1 +- {worst:.2g} (update over rollout {update:.2g}, rollout over sampling {rollout:.2g})",
        f"1 +- {limit:g} in every token",
        fail=not worst <= limit,
        reason="the tokens were drawn from another distribution than the update believes: "
        + ("dropout, or another precision" if update >= rollout else "position ids or masks under padding, or a sampler with settings"),
        remedy="switch dropout off; give left-padded rows position ids that count real tokens; sample with a temperature and nothing else",
        numbers={"ratio_update": update, "ratio_rollout": rollout},
    )


def ends(case: Case, role: str = "sft") -> Finding:
    """At least half of the samples end by EOS (else fail), and 9 in 10 (else a warning).

    A response that does not end gets the score -1 and is cut in mid-sentence. Where that is the rule, EOS was not in the loss (pad = EOS,
    masked) or not in the data, and PPO spends its KL on learning to stop.
    """
    made = _made(case, role)
    found = grouped_share(made.finished)
    return judge(
        _name("ends", role),
        f"{found.mean:.1%} (95%: {found.low:.1%} to {found.high:.1%}) of {len(made.finished)} samples, within "
        f"{case.sampling.max_new_tokens} tokens",
        "at least 50%, better 90%",
        fail=found.mean < 0.5,
        warn=found.mean < 0.9,
        reason="the model does not end its responses by EOS: it never saw EOS as a target, or it writes longer than max_new_tokens",
        remedy="train SFT with EOS in the loss (lit_rlhf adds it to every response; elsewhere check that padding is not EOS), or raise "
        "max_new_tokens",
        numbers={"eos_rate": found.mean, "low": found.low, "high": found.high},
    )


def length(case: Case, role: str = "sft") -> Finding:
    """Samples are as long as the references they imitate: a mean between 3/4 and 4/3 of theirs, else a warning; 3/5 and 5/3, else fail.

    SFT matches the references' distribution of lengths; at T = 0.7 the means lie within some 15%. Half as long: it learnt from cut ones.
    """
    made = _made(case, role)
    sample = float((made.batch.response_mask.sum(1) - made.finished.long()).float().mean())  # EOS aside
    wanted = float(case.lengths(case.references[1]).mean())
    share = sample / wanted
    return judge(
        _name("length", role),
        f"{sample:.1f} tokens, {share:.2f} of the references' {wanted:.1f}",
        "0.75 to 1.33 of the references' length, at the least 0.6 to 1.67",
        fail=role == "sft" and not 0.6 <= share <= 1.67,
        warn=not 0.75 <= share <= 1.33,
        reason="the model writes shorter than people do: its training summaries were cut, or it ends too early"
        if share < 1
        else "the model writes longer than people do: EOS is not learnt, or the reward pays for length",
        remedy="look at the training file's responses (`truncation` says if they pile up at a limit) and at max_response_tokens",
        numbers={"sample": sample, "reference": wanted, "share": share},
    )


def repetition(case: Case, role: str = "sft") -> Finding:
    """Samples do not repeat themselves or each other, and are not empty (`collapse.signs`).

    Fails where over half of the 3-grams repeat an earlier one, over half of the texts are the same, or over a tenth are empty; a fifth of
    either of the first two warns. People's summaries and those of SFT models of any use have a few per cent.
    """
    made = _made(case, role)
    found = signs(made.texts, made.batch.response_ids, made.batch.response_mask, made.finished)
    found = {name: found[name] for name in ("repetition", "same_rate", "empty_rate")}
    worst = max(found, key=lambda name: found[name] * (5 if name == "empty_rate" else 1))
    return judge(
        _name("repetition", role),
        ", ".join(f"{name} {value:.1%}" for name, value in found.items()),
        "repetition and same_rate under 20%, at the most 50%; empty_rate at most 10%",
        fail=found["repetition"] > 0.5 or found["same_rate"] > 0.5 or found["empty_rate"] > 0.1,
        warn=found["repetition"] > 0.2 or found["same_rate"] > 0.2,
        reason=f"the samples are degenerate: {found[worst]:.0%} {SIGNS[worst]}",
        remedy="train SFT longer or at a lower rate; look at its samples; of a PPO policy: more KL penalty, an earlier checkpoint",
        numbers=found,
    )


def drift(case: Case) -> Finding:
    """What PPO bought: a score that rose, for a KL from SFT that is not negative and under 50 nats a response (a warning above 20).

    KL of the policy's own samples cannot be negative in the mean: below 0, log-probs and samples do not belong together. Stiennon et
    al. (2020) used 2 to 19 nats, and what people preferred got worse from about there.
    """
    made = case.trained_rollout
    mean = grouped_mean((k1(made.logprobs, made.ref_logprobs) * made.batch.response_mask).sum(1))
    gain = grouped_mean(case.score(case.prompts, made.texts) - case.kinds["sample"])
    return judge(
        "drift",
        f"score {gain.mean:+.3g} ({gain.low:.3g} to {gain.high:.3g}) for {mean.mean:.3g} nats ({mean.low:.3g} to {mean.high:.3g})",
        "a score above SFT's; KL of 0 to 20 nats, at the most 50",
        fail=gain.high < 0 or mean.high < 0 or mean.mean > 50,
        warn=gain.low <= 0 or mean.mean > 20,
        reason="PPO lowered the score"
        if gain.high < 0
        else "PPO's gain is within the noise"
        if gain.low <= 0
        else "KL is negative: samples and log-probs do not belong together"
        if mean.high < 0
        else "the policy is so far from SFT that the reward model cannot be believed (see `lit-rlhf frontier`)",
        remedy="train longer or at a higher rate where nothing moved; raise kl_coef (or set kl_target) where KL is large",
        numbers={"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high, "kl": mean.mean, "kl_low": mean.low},
    )


def _made(case: Case, role: str) -> Rollout:
    if role == "policy" and case.policy is None:
        raise NotMeasurable("no --policy was given")
    return case.rollout if role == "sft" else case.trained_rollout


def _name(name: str, role: str) -> str:
    return name if role == "sft" else f"{name} ({role})"
