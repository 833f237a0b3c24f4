"""What ours computed: padding of its training rows, and the share of the matrix-product peak that the update reached."""

import json
from typing import Any

import measuring
import torch
from job import PPO_EPOCHS, Job


class Tally:
    """Counts the tokens of every training row laid out, real ones and padding."""

    def __init__(self) -> None:
        self.real, self.slots = 0, 0
        self.lengths: list[tuple[int, list[int]]] = []

    def watch(self, networks: Any) -> None:
        """Looks on where the networks lay a batch out."""
        inner = networks.pack

        def pack(batch: Any, *args: Any, **kwargs: Any) -> Any:
            layout = inner(batch, *args, **kwargs)
            if torch.is_grad_enabled():
                prompts, responses = batch.prompt_mask.sum(1).tolist(), batch.response_mask.sum(1).tolist()
                self.real += sum(prompts) + sum(responses)
                self.slots += layout.input_ids.numel()
                self.last = prompts, responses, batch.prompt_of.tolist()
            return layout

        networks.pack = pack

    def figures(self, job: Job, found: dict[str, Any]) -> dict[str, Any]:
        """Padding share; for PPO also the update's FLOPs and its share of the measured peak."""
        out: dict[str, Any] = {"padding": 1 - self.real / self.slots if self.slots else None}
        if job.stage != "ppo":
            return out
        shape = json.loads((job.work / "models.json").read_text())
        flops = update_flops(shape, *self.last)
        seconds = found["seconds_per_step"] - found["phases"].get("collect", 0.0)
        peaks = {name: measuring.matmul_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
        peak = peaks["bfloat16" if job.precision == "bf16" else "float32"]
        names = ("with_recomputation", "without_recomputation")
        shares = {name: flops[name] / seconds / 1e9 / peak for name in names}
        return out | {"peak_gflops": peaks, "update_flops": flops, "update_seconds": seconds, "share_of_peak": shares}


def update_flops(shape: dict[str, int], prompts: list[int], responses: list[int], prompt_of: list[int]) -> dict[str, float]:
    """FLOPs of the matrix products of one PPO iteration's update (all epochs, policy and value network) for one minibatch of these lengths.

    Counted, two per multiply-add: the blocks' weights on every real token once (a prompt once for all its responses, no padding);
    attention's two products on the tokens that the rule lets each token see; the LM head on response tokens, the scalar head nowhere
    (negligible). The backward pass counts twice the forward. Not counted: softmax, norms, the optimiser, layout.
    `with_recomputation` adds one more LM head forward, as the chunked log-probs compute the logits again in the backward pass.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    wide = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    block = 2 * hidden * hidden + 2 * hidden * wide + 3 * hidden * shape["intermediate_size"]
    tokens = sum(prompts) + sum(responses)
    seen = sum(p * (p + 1) / 2 for p in prompts)
    seen += sum(r * prompts[m] + r * (r + 1) / 2 for r, m in zip(responses, prompt_of, strict=True))
    backbone = layers * (2 * block * tokens + 2 * 2 * hidden * seen)
    head = 2 * hidden * shape["vocabulary"] * sum(responses)
    once = 3 * (2 * backbone + head)
    return {
        "without_recomputation": PPO_EPOCHS * once,
        "with_recomputation": PPO_EPOCHS * (once + head),
        "backbone": PPO_EPOCHS * 3 * 2 * backbone,
        "head": PPO_EPOCHS * 3 * head,
        "tokens": tokens,
        "response_tokens": sum(responses),
    }
