"""The three stages as LightningModules."""

from lit_rlhf.modules.pairwise_reward import PairwiseReward
from lit_rlhf.modules.ppo import PPO
from lit_rlhf.modules.sft import SFT

__all__ = ["PPO", "PairwiseReward", "SFT"]
