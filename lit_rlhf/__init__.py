"""lit_rlhf: learning from human feedback on PyTorch Lightning.

Names are loaded when they are first used, so that `import lit_rlhf` and the command line's first error are quick.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "SFT": "modules",
    "PairwiseReward": "modules",
    "PPO": "modules",
    "DPO": "modules",
    "RLOO": "modules",
    "BestOfN": "modules",
    "ILQL": "modules",
    "RFT": "modules",
    "NLPO": "modules",
    "Quark": "modules",
    "SFTDataModule": "data",
    "PairwiseDataModule": "data",
    "PromptDataModule": "data",
    "rewarded_rows": "data",
    "Sampling": "generation",
    "Batch": "batch",
    "Schedule": "optim",
    "ExportHF": "callbacks",
    "CheckpointGuard": "callbacks",
    "AtomicCheckpointIO": "checkpoint_io",
    "SampleTable": "callbacks",
    "RewardParts": "callbacks",
    "RewardEnsemble": "rewards",
    "WeightedRewards": "rewards",
    "Rule": "rewards",
    "RewardReport": "callbacks",
    "inspect_response": "inspector",
    "JSONLWriter": "callbacks",
    "Throughput": "callbacks",
    "Profile": "callbacks",
    "PipelineReward": "scoring",
    "train": "api",
    "best_of_n": "best_of",
}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lit_rlhf.{_HOME[name]}"), name)
