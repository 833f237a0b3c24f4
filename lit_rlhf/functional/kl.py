"""Estimators of KL(policy || reference) from the policy's own samples, and Ziegler et al.'s controller of its coefficient."""

import math

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log q: unbiased, may be negative for one sample.

    Shapes: both equal, any; result float32, nats. Source: Schulman 2020, "Approximating KL Divergence" (k1, k2 and k3).
    """
    return logprobs.float() - ref_logprobs.float()


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: biased, never negative, low variance. Shapes and source: as k1."""
    return k1(logprobs, ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased, never negative. Shapes and source: as k1."""
    difference = k1(logprobs, ref_logprobs)
    return torch.expm1(-difference) + difference


def adapt_kl_coef(coef: float, kl: float, *, target: float, horizon: float, n: int) -> float:
    """coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon): the coefficient after a rollout of n responses.

    kl, target: nats per response (sum over tokens of k1, mean over responses). horizon: responses. Call it once per rollout, not per
    backward. Source: Ziegler et al. 2019, eq. 2 (arXiv:1909.08593).
    Errors: ValueError for a KL that is not finite, target <= 0, or n outside 1..5*horizon (the coefficient would reach 0).
    """
    if not math.isfinite(kl):
        raise ValueError(f"the KL is {kl}: the policy or the reference gives log-probs that are not finite")
    if target <= 0 or not 0 < n < 5 * horizon:
        raise ValueError(f"target {target} must be above 0 and n {n} between 1 and 5 * horizon ({5 * horizon:g}), exclusive")
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)
