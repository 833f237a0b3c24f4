"""tutorials/metrics.md has every metric that the algorithms beside the three stages log."""

import pytest
from test_tutorials import SHORT, length, logged, undocumented

from lit_rlhf import ILQL, NLPO, RFT, PromptDataModule, Quark, SFTDataModule

SAMPLED = {"reward_fn": length, "sampling": SHORT}
CASES = {
    "rft": (lambda d: RFT(d, n=2, num_prompts=8, minibatches=2, **SAMPLED), {"rollout/kept", "train/loss", "val/score", "test/rouge1"}),
    "quark": (
        lambda d: Quark(d, num_prompts=8, minibatch_size=4, minibatches=2, **SAMPLED),
        {"rollout/best_quantile_score", "train/kl", "train/entropy", "val/kl"},
    ),
    "nlpo": (
        lambda d: NLPO(d, min_tokens=2, batch_size=8, ppo_epochs=2, kl_target=1.0, **SAMPLED),
        {"rollout/kl_coef", "val/kl", "ppo/policy_loss"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_logged_is_on_the_page(name, sft_dir, sft_rows, make_trainer):
    make, some = CASES[name]
    data = PromptDataModule(sft_rows, val_data=sft_rows[:4], test_data=sft_rows[:4])
    names = logged(make_trainer, make(sft_dir), data)
    assert some <= names and undocumented(names) == set()


def test_ilql(sft_dir, sft_rows, make_trainer):
    rows = [row | {"reward": i} for i, row in enumerate(sft_rows)]
    data = SFTDataModule(rows, val_data=rows[:4], test_data=rows[:4], batch_size=8)
    names = logged(make_trainer, ILQL(sft_dir, **SAMPLED), data)
    assert {"train/q_loss", "train/advantage_mean", "val/loss", "val/score", "test/eos_rate"} <= names and undocumented(names) == set()
