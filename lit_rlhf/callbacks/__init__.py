"""Lightning callbacks of lit_rlhf: what a run leaves behind and what it shows."""

from lit_rlhf.callbacks.checkpoint_guard import CheckpointGuard
from lit_rlhf.callbacks.export_hf import ExportHF
from lit_rlhf.callbacks.jsonl_writer import JSONLWriter
from lit_rlhf.callbacks.profile import Profile
from lit_rlhf.callbacks.progress import LeanProgressBar
from lit_rlhf.callbacks.reward_parts import RewardParts
from lit_rlhf.callbacks.reward_report import RewardReport
from lit_rlhf.callbacks.sample_table import SampleTable
from lit_rlhf.callbacks.throughput import Throughput

__all__ = [
    "CheckpointGuard",
    "ExportHF",
    "JSONLWriter",
    "LeanProgressBar",
    "Profile",
    "RewardParts",
    "RewardReport",
    "SampleTable",
    "Throughput",
]
