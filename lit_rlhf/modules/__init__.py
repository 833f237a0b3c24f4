"""The three stages as LightningModules, other algorithms, and best-of-n, which trains nothing."""

from lit_rlhf.modules.best_of_n import BestOfN
from lit_rlhf.modules.dpo import DPO
from lit_rlhf.modules.ilql import ILQL
from lit_rlhf.modules.nlpo import NLPO
from lit_rlhf.modules.pairwise_reward import PairwiseReward
from lit_rlhf.modules.ppo import PPO
from lit_rlhf.modules.quark import Quark
from lit_rlhf.modules.rft import RFT
from lit_rlhf.modules.rloo import RLOO
from lit_rlhf.modules.sft import SFT

__all__ = ["DPO", "ILQL", "NLPO", "PPO", "RFT", "RLOO", "SFT", "BestOfN", "PairwiseReward", "Quark"]
