"""The three stages as LightningModules, and best-of-n, which trains nothing."""

from lit_rlhf.modules.best_of_n import BestOfN
from lit_rlhf.modules.pairwise_reward import PairwiseReward
from lit_rlhf.modules.ppo import PPO
from lit_rlhf.modules.sft import SFT

__all__ = ["PPO", "SFT", "BestOfN", "PairwiseReward"]
