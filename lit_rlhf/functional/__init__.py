"""The maths of RLHF as functions of tensors: torch only, no state; each equation with its source stands in its docstring."""

from lit_rlhf.functional.advantages import gae, token_rewards
from lit_rlhf.functional.best_of_n import best_of_n_kl, best_of_n_mean, fit_law
from lit_rlhf.functional.dpo import dpo_loss
from lit_rlhf.functional.ensembles import lower_bound, preference_spread, spread, weighted_sum
from lit_rlhf.functional.ilql import ilql_loss, last_token_rewards, move_towards
from lit_rlhf.functional.kl import adapt_kl_coef, k1, k2, k3
from lit_rlhf.functional.logprobs import token_entropy, token_logprobs
from lit_rlhf.functional.losses import lm_loss, pairwise_loss, pairwise_token_loss, policy_loss, ranking_loss, value_loss
from lit_rlhf.functional.masking import last_index, masked_mean, through_first, whiten
from lit_rlhf.functional.nlpo import masked_token_logprobs, nucleus
from lit_rlhf.functional.preferences import calibration_floor, difference_correlation, label_agreement
from lit_rlhf.functional.quark import logprobs_kl_entropy, quantiles, quark_loss
from lit_rlhf.functional.rft import best_of_each, first_of_equal
from lit_rlhf.functional.rloo import group_normalised, leave_one_out, rloo_loss
from lit_rlhf.functional.statistics import bootstrap_mean, calibration_error, correlation, grouped_mean, grouped_share, reliability

__all__ = [
    "adapt_kl_coef",
    "best_of_each",
    "best_of_n_kl",
    "best_of_n_mean",
    "bootstrap_mean",
    "calibration_error",
    "calibration_floor",
    "correlation",
    "difference_correlation",
    "dpo_loss",
    "first_of_equal",
    "fit_law",
    "gae",
    "group_normalised",
    "grouped_mean",
    "grouped_share",
    "ilql_loss",
    "k1",
    "k2",
    "k3",
    "label_agreement",
    "last_index",
    "leave_one_out",
    "last_token_rewards",
    "lm_loss",
    "logprobs_kl_entropy",
    "lower_bound",
    "masked_mean",
    "masked_token_logprobs",
    "move_towards",
    "nucleus",
    "pairwise_loss",
    "pairwise_token_loss",
    "policy_loss",
    "preference_spread",
    "quantiles",
    "quark_loss",
    "ranking_loss",
    "reliability",
    "rloo_loss",
    "spread",
    "through_first",
    "token_entropy",
    "token_logprobs",
    "token_rewards",
    "value_loss",
    "weighted_sum",
    "whiten",
]
