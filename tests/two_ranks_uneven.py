"""Ranks that have unequal amounts to do at every turn; a rank that ran fewer forward passes than the other would leave it waiting.

Part of two_ranks_checkpoints.py: responses of 1 token on one rank and of 12 on the other, 4 prompts and 5, groups of at most 4 responses,
passes of at most 24 tokens, validation of 2 and 1 rows and then 2 and 2.
"""

from unittest import mock

from two_ranks import PAIRS, ROWS, trainer

from lit_rlhf import PPO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, SFTDataModule, generation, rollout


def forced(rank: int):
    """`generation.draw`, on rank 0 of EOS (id 1) at once, on rank 1 never of EOS."""
    draw = generation.draw

    def by_rank(logits, banned, *more):
        logits = logits.clone()
        logits[:, 1] = 1e4 if rank == 0 else -1e4
        return draw(logits, banned, *more)

    return mock.patch.object(generation, "draw", by_rank)


def uneven_ppo(sft_dir: str, reward_dir: str) -> PPO:
    more = {"batch_size": 18, "responses_per_prompt": 2, "ppo_epochs": 1, "tokens_per_forward": 24}
    return PPO(sft_dir, reward_model=reward_dir, sampling=Sampling(12, 1.0), **more)


def run(name: str, sft_dir: str, reward_dir: str) -> dict:
    """The lengths of PPO's responses and of validation's, by the order of the prompts; and that SFT and reward training came through."""
    sampling = Sampling(12, 1.0)
    ppo = uneven_ppo(sft_dir, reward_dir)
    data = PromptDataModule(ROWS, val_data=ROWS[:7], max_prompt_tokens=64, val_batch_size=3)
    with mock.patch.object(rollout, "CACHED_FORWARDS", 4):
        fit = trainer(name, max_steps=1)
        with forced(fit.global_rank):
            fit.fit(ppo, datamodule=data)
    found = {"lengths": ppo.experience.batch.response_mask.sum(1).tolist(), "val lengths": [row["length"] for row in ppo.samples]}
    with forced(fit.global_rank):
        fit = trainer(name, max_steps=1)
        fit.fit(SFT(sft_dir, sampling=sampling), datamodule=SFTDataModule(ROWS[:9], val_data=ROWS[:7], batch_size=9, val_batch_size=3))
        found["sft"] = float(fit.callback_metrics["val/length"])
    fit = trainer(name, max_steps=1)
    reward = PairwiseReward(sft_dir, reference_rows=7)
    fit.fit(reward, datamodule=PairwiseDataModule(PAIRS[:9], val_data=PAIRS[:7], batch_size=9, val_batch_size=3))
    reward.export_networks()
    return found | {"reward": float(reward.network.mean)}


def same_texts(name: str, sft_dir: str, reward_dir: str) -> list[str]:
    """The unforced texts of the same uneven rollout."""
    ppo = uneven_ppo(sft_dir, reward_dir)
    with mock.patch.object(rollout, "CACHED_FORWARDS", 4):
        trainer(name, max_steps=1).fit(ppo, datamodule=PromptDataModule(ROWS, max_prompt_tokens=64))
    return [*ppo.tokenizer.batch_decode(list(ppo.experience.batch.response_ids)), *map("{:.4f}".format, ppo.experience.scores)]
