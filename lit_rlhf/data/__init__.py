"""Data: TL;DR text, schemas, loaders and the three DataModules."""

from lit_rlhf.data.pairs import PairwiseDataModule
from lit_rlhf.data.prompts import PromptDataModule
from lit_rlhf.data.rewarded import rewarded_rows
from lit_rlhf.data.sft import SFTDataModule

__all__ = ["PairwiseDataModule", "PromptDataModule", "SFTDataModule", "rewarded_rows"]
