"""Checks of the reward: does it order pairs, by what, and does it order what must be in order."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.doctor.case import Case
from lit_rlhf.doctor.finding import Finding, judge
from lit_rlhf.functional import calibration_error, correlation, grouped_mean, grouped_share, last_index, reliability
from lit_rlhf.networks import in_parts
from lit_rlhf.scoring import text_batch

TOKENS = 16384  # of one forward pass


def accuracy(case: Case) -> Finding:
    """The preferred response scores higher more often than by chance: the 95% interval lies above 0.5 (ties of scores are wrong).

    Published models reach 0.6 to 0.7 on TL;DR, people agree in 0.73 to 0.77 (Stiennon et al. 2020, C.2). At chance: the head
    is new, the backbone is a raw model's (trlX issue 338), or the pairs are of another task. Below: chosen and rejected are swapped.
    """
    chosen, rejected = case.pair_scores
    found = grouped_share(chosen > rejected, case.pairs.rows)
    flipped = found.high < 0.5
    return judge(
        "accuracy",
        f"{found.mean:.3f} (95%: {found.low:.3f} to {found.high:.3f}) on {len(chosen):,} pairs of {case.pairs.source}",
        "an interval above 0.5",
        fail=found.low <= 0.5,
        warn=found.mean < 0.55,
        reason="the reward prefers what people reject: its sign is flipped, or chosen and rejected are swapped (or its head is new: `head`)"
        if flipped
        else "the reward is at chance, or hardly above it: its head is new or not the trained one, it began from a raw model, or it was "
        "trained on something else",
        remedy="negate the head, or swap the columns and train again"
        if flipped
        else "see `head`, `eos_read` and `lineage`; start from the SFT directory, with more pairs",
        numbers={"accuracy": found.mean, "low": found.low, "high": found.high, "pairs": float(len(chosen))},
    )


def head(case: Case) -> Finding:
    """No fresh linear head on the same states orders pairs better than the model's own, by 5 points or more beyond the noise.

    A probe (logistic regression on the differences of the last states) is fitted on one half of the prompts and tried on the other, both
    ways. Where the backbone knows and the head does not, the head was initialised anew or got lost on the way.
    """
    pairs = case.pairs
    chosen, rejected = (_last_states(case, pairs.prompts, texts) for texts in (pairs.chosen, pairs.rejected))
    own = (case.pair_scores[0] > case.pair_scores[1]).double()
    probe = _probe((chosen - rejected).cpu(), pairs.rows)
    gain = grouped_mean(probe.double() - own, pairs.rows)
    turned = (case.pair_scores[0] < case.pair_scores[1]).double()
    flipped = grouped_mean(probe.double() - turned, pairs.rows).low <= 0.02  # the head turned round is as good as the probe
    return judge(
        "head",
        f"a fresh probe orders {float(probe.double().mean()):.3f}, the head {float(own.mean()):.3f} "
        f"({gain.mean:+.3f}, 95%: {gain.low:+.3f} to {gain.high:+.3f})",
        "a probe that is no better by 0.05 or more",
        fail=gain.low > 0.05,
        reason="the head points the wrong way: its sign is flipped"
        if flipped
        else "the states know which response is preferred and the head does not: it was initialised anew, or is not the trained one",
        remedy="negate score.weight, or swap chosen and rejected and train again"
        if flipped
        else "look for 'newly initialized: score.weight' in the log that wrote it; export again from the run's checkpoint",
        numbers={"probe": float(probe.double().mean()), "own": float(own.mean()), "gain_low": gain.low, "gain_high": gain.high},
    )


def eos_read(case: Case) -> Finding:
    """The score after EOS orders pairs better than the one a token before it: its loss is lower, or higher by less than the noise.

    A model that was trained on texts without EOS has an untrained state there, and PPO reads its scores at EOS. The loss is -log sigmoid of
    the differences over their own standard deviation, so that the two readings' scales do not matter; it tells far more than accuracy.
    """
    pairs, network = case.pairs, case.network
    hits, losses = [], []
    for shift in (0, 1):
        scores = [_scores_before_end(case, pairs.prompts, texts, shift) for texts in (pairs.chosen, pairs.rejected)]
        margin = scores[0] - scores[1]
        hits.append(float((margin > 0).double().mean()))
        losses.append(-F.logsigmoid(margin / margin.std().clamp(min=1e-6)))
    cost = grouped_mean(losses[0] - losses[1], pairs.rows)
    return judge(
        "eos_read",
        f"accuracy {hits[0]:.3f} read at {network.tokenizer.eos_token}, {hits[1]:.3f} a token before; "
        f"EOS costs {cost.mean:+.3f} nats of loss (95%: {cost.low:+.3f} to {cost.high:+.3f})",
        "reading at EOS costs nothing",
        fail=cost.low > 0,
        warn=cost.mean > 0.02,
        reason="the reward model reads better without EOS than with it: its training texts had none, or lost it to truncation or padding",
        remedy="train the reward model on responses that end in EOS (lit_rlhf's DataModules add it), or score without it everywhere",
        numbers={"with": hits[0], "without": hits[1], "cost": cost.mean, "cost_low": cost.low, "cost_high": cost.high},
    )


def calibration(case: Case) -> Finding:
    """sigmoid(difference of scores) is the share of such pairs that people order so: an expected calibration error of at most 0.1.

    Guo et al. 2017's measure over ten bins. A difference of 1 is the unit in which PPO's kl_coef weighs KL; over-fitted models claim far
    more than they deliver. Fails above 0.25.
    """
    chosen, rejected = case.pair_scores
    margin = (chosen - rejected).double()
    confidence, right = margin.abs().sigmoid(), margin > 0
    error = calibration_error(reliability(confidence, right))
    claimed, true = float(confidence.mean()), float(right.double().mean())
    return judge(
        "calibration",
        f"expected calibration error {error:.3f} (claims {claimed:.3f} on average, delivers {true:.3f})",
        "at most 0.1, at the most 0.25",
        fail=error > 0.25,
        warn=error > 0.1,
        reason="the scores' differences claim "
        + ("more" if claimed > true else "less")
        + " than they deliver: kl_coef means something else",
        remedy="one epoch, a lower rate, or center_coef against over-fitting; or scale_scores in PPO",
        numbers={"ece": error, "confidence": claimed, "accuracy": true},
    )


def length_bias(case: Case) -> Finding:
    """The score is not length in disguise: pairs of like length are ordered better than by chance, and R^2 with length is under 0.5.

    R^2 is that of the pairs' differences of scores against their differences of length in tokens: the share of the variance within a prompt
    that length explains; over 0.8 fails. Of like length are pairs that differ by at most a tenth of the longer one, or the quarter of
    the pairs that differ least. Singhal et al. 2023 (arXiv:2310.03716): length explains most of what many reward models pay for.
    """
    pairs = case.pairs
    longs = [case.lengths(texts) for texts in (pairs.chosen, pairs.rejected)]
    scores = [*case.pair_scores]
    difference = longs[0] - longs[1]
    margin = scores[0] - scores[1]
    share = correlation(torch.cat([difference, -difference]), torch.cat([margin, -margin])) ** 2  # either order: means of 0
    relative = difference.abs() / torch.maximum(*longs).clamp(min=1)
    near = relative <= max(0.1, float(relative.quantile(0.25)))
    matched = grouped_share((scores[0] > scores[1])[near], pairs.rows[near])
    longer = grouped_share((difference > 0)[difference != 0], pairs.rows[difference != 0]) if (difference != 0).any() else matched
    overall = grouped_share(scores[0] > scores[1], pairs.rows)
    blind = overall.low > 0.5 and matched.low <= 0.5 and overall.mean - matched.mean > 0.05
    return judge(
        "length_bias",
        f"length explains {share:.0%} of the differences of scores; accuracy at like length ({int(near.sum())} pairs) {matched.mean:.3f} "
        f"(95%: {matched.low:.3f} to {matched.high:.3f}); people prefer the longer one {longer.mean:.0%}",
        "above 0.5 at like length; R^2 under 0.5",
        fail=blind or share > 0.8,
        warn=share > 0.5,
        reason=f"the score follows length{', at like length it is at chance' if blind else ''}: PPO will make responses longer or shorter",
        remedy="balance the pairs by length, or add pairs of like length; watch rollout/length in PPO",
        numbers={"r2": share, "matched": matched.mean, "matched_low": matched.low, "longer_preferred": longer.mean},
    )


def order(case: Case) -> Finding:
    """Reference > another post's, cut and shuffled summary, and SFT sample > another post's, in the mean over posts beyond the noise.

    A reward that does not place these is one that PPO will satisfy with text that has nothing to do with the post or with language. The SFT
    sample should lie below the reference too, but a good model's at T = 0.7 may not: that is a warning.
    """
    means = {name: float(scores.mean()) for name, scores in case.kinds.items()}
    must = [("reference", "other"), ("reference", "truncated"), ("reference", "shuffled"), ("sample", "other")]
    gaps = {f"{a} - {b}": grouped_mean(case.kinds[a] - case.kinds[b]) for a, b in [*must, ("reference", "sample")]}
    wrong = [name for name, gap in list(gaps.items())[:-1] if gap.low <= 0]
    inverted = gaps["reference - sample"].high < 0
    return judge(
        "order",
        " > ".join(f"{name} {means[name]:.2f}" for name in sorted(means, key=lambda n: -means[n])),
        "reference > sample > other, and reference > truncated, shuffled",
        fail=bool(wrong),
        warn=inverted,
        reason="not ordered: "
        + ", ".join(f"{name} is {gaps[name].mean:.2f} ({gaps[name].low:.2f} to {gaps[name].high:.2f})" for name in wrong)
        if wrong
        else "the SFT model's samples score above the references: it is good, or the reward likes what models write",
        remedy="look at `accuracy` first; add such pairs (another post's summary, a cut one) to the comparisons"
        if wrong
        else "read samples that beat their references before PPO learns from this reward",
        numbers=means | {f"{name}_low": gap.low for name, gap in gaps.items()},
    )


def center(case: Case) -> Finding:
    """References score 0 in the mean, within one standard deviation: the -1 of unfinished responses and the first values rely on it."""
    scores = case.kinds["reference"]
    mean, spread = float(scores.mean()), float(torch.cat(list(case.kinds.values())).std(unbiased=False))
    return judge(
        "center",
        f"references score {mean:.2f} in the mean, all kinds of responses vary by {spread:.2f}",
        "within one standard deviation of 0",
        warn=abs(mean) > spread,
        reason="0 is not what a reference is worth: no_eos_score -1 may reward or ruin responses that do not end",
        remedy="export with PairwiseReward, which sets config.reward_mean; or set no_eos_score and reward_baseline yourself",
        numbers={"mean": mean, "spread": spread},
    )


def _last_states(case: Case, prompts: list[str], responses: list[str]) -> Tensor:
    """What the head reads for each response, (N, H)."""
    network = case.network

    def states(batch):  # type: ignore[no-untyped-def]
        found = network.states(batch)
        return found[torch.arange(len(found)), last_index(batch.response_mask) + 1].float()

    with torch.no_grad():
        return in_parts(network, text_batch(network.tokenizer, prompts, responses).to(case.device), TOKENS, states)


def _scores_before_end(case: Case, prompts: list[str], responses: list[str], shift: int) -> Tensor:
    """Scores (N,) read `shift` tokens before the last."""
    network = case.network

    def scores(batch):  # type: ignore[no-untyped-def]
        return network(batch).gather(1, (last_index(batch.response_mask)[:, None] + 1 - shift).clamp(min=0))

    with torch.no_grad():
        return in_parts(network, text_batch(network.tokenizer, prompts, responses).to(case.device), TOKENS, scores)[:, 0].cpu()


def _probe(differences: Tensor, rows: Tensor) -> Tensor:
    """Which pairs (Q,) bool a logistic regression orders, fitted on the prompts of the other half; differences (Q, H)."""
    out = torch.zeros(len(differences), dtype=torch.bool)
    x = differences / differences.std(0).clamp(min=1e-6)
    even = rows % 2 == 0
    for half in (even, ~even):
        if not half.any() or half.all():
            continue
        weight = torch.zeros(x.shape[1], requires_grad=True)
        fit = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")
        fitted = x[~half]

        def loss(fitted: Tensor = fitted, weight: Tensor = weight, fit: torch.optim.LBFGS = fit) -> Tensor:
            fit.zero_grad()
            value = -F.logsigmoid(fitted @ weight).mean() + 0.05 * weight.square().sum() / 2
            value.backward()
            return value

        fit.step(loss)
        out[half] = (x[half] @ weight.detach()) > 0
    return out
