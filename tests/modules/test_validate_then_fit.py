"""A notebook validates, fits and validates again with the same module."""

import pytest

from lit_rlhf import PPO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, SFTDataModule

SHORT = Sampling(max_new_tokens=4)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_module_that_was_validated_can_be_fitted(stage, sft_dir, sft_rows, pair_rows, make_trainer):
    module, data = {
        "sft": lambda: (SFT(sft_dir, sampling=SHORT), SFTDataModule(sft_rows, val_data=sft_rows, batch_size=8)),
        "reward": lambda: (PairwiseReward(sft_dir), PairwiseDataModule(pair_rows, val_data=pair_rows, batch_size=8)),
        "ppo": lambda: (
            PPO(sft_dir, reward_fn=lambda prompts, responses: [len(r) for r in responses], sampling=SHORT, batch_size=8, ppo_epochs=1),
            PromptDataModule(sft_rows, val_data=sft_rows),
        ),
    }[stage]()
    trainer = make_trainer(max_epochs=1, num_sanity_val_steps=2)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    assert any(name.startswith("val/") for name in trainer.callback_metrics)
