"""One response, token by token: what PPO sees of it."""

from lit_rlhf.inspector.inspection import Inspection, inspect_response

__all__ = ["Inspection", "inspect_response"]
