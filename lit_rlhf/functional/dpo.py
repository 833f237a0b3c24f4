"""Direct preference optimisation: losses on how much likelier whole responses became, with no reward model and no samples."""

from typing import Literal

from torch import Tensor

from lit_rlhf.functional.losses import Stats, pairwise_loss
from lit_rlhf.functional.masking import divisor

DPOLoss = Literal["sigmoid", "ipo"]


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: DPOLoss = "sigmoid",
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    target: Tensor | None = None,
    count: float | None = None,
) -> tuple[Tensor, Stats]:
    """The mean over pairs of -[t log sigmoid(d) + (1 - t) log sigmoid(-d)], d = beta * chosen - beta * rejected - margin ("sigmoid").

    "ipo": t (d / beta - 1 / (2 beta))^2 + (1 - t) (d / beta + 1 / (2 beta))^2. beta * (log-ratio) is the implicit reward of a response.

    Shapes: all (Q,). chosen, rejected: log pi(y | x) - log pi_ref(y | x) in nats, summed over the response's tokens (for "ipo" their mean
        over tokens, see `DPO`); gradients flow through them. count: pairs.
    beta: the strength of the KL penalty to the reference; a small one lets the policy go far.
    label_smoothing: epsilon in [0, .5), the share of labels that are taken to be flipped (conservative DPO): t becomes
        (1 - epsilon) t + epsilon (1 - t).
    margin: what the chosen response's implicit reward must be ahead by (Amini et al. 2024, arXiv:2402.10571). target: t; None = 1.
    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); Azar et al. 2023, eq. 17 (arXiv:2310.12036); Mitchell 2023, "A note on DPO with
        noisy preferences". TRL and Rafailov et al.'s code have the same two formulas.
    stats: loss; accuracy (of the implicit rewards, as in pairwise_loss); margin (chosen - rejected); chosen_reward; rejected_reward.
    Errors: ValueError for beta <= 0 or a label_smoothing outside [0, .5).
    """
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta {beta} must be above 0 and label_smoothing {label_smoothing} at least 0 and below 0.5")
    if target is None and label_smoothing:
        target = chosen.new_ones(len(chosen))
    if target is not None:
        target = (1 - label_smoothing) * target.float() + label_smoothing * (1 - target.float())
    loss, stats = pairwise_loss(beta * chosen.float(), beta * rejected.float(), margin=margin, target=target, count=count)
    if kind == "ipo":
        ahead = chosen.float() - rejected.float() - (0.0 if margin is None else margin.float() / beta)
        t = 1.0 if target is None else target
        per_pair = t * (ahead - 0.5 / beta).square() + (1 - t) * (ahead + 0.5 / beta).square()
        loss = per_pair.sum() / divisor(len(chosen), count)
    renamed = {"chosen_score": "chosen_reward", "rejected_score": "rejected_reward"}
    return loss, {renamed.get(name, name): value for name, value in stats.items()} | {"loss": loss.detach()}
