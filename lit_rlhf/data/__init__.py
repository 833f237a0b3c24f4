"""Data: TL;DR text, schemas, loaders and the three DataModules."""

from lit_rlhf.data.sft import SFTDataModule

__all__ = ["SFTDataModule"]
