"""MaskedPolicy: a policy that may only say what another one finds likely, in sampling and in log-probs alike."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.batch import Batch
from lit_rlhf.decoding import Decoder, can_share_rows
from lit_rlhf.functional import masked_token_logprobs, nucleus
from lit_rlhf.generation import LOWEST
from lit_rlhf.networks import CausalPolicy, lay_out


class MaskedPolicy(nn.Module):
    """The policy's distribution over the nucleus of `guide`; for `sample` and `collect` a policy like any other.

    Args:
        policy, guide: of one architecture and tokenizer; the guide gets no gradient.
        top_p, min_tokens: the nucleus (`functional.nucleus`), at the temperature of sampling.
    """

    def __init__(self, policy: CausalPolicy, guide: CausalPolicy, temperature: float, top_p: float, min_tokens: int) -> None:
        super().__init__()
        self.policy, self.guide = policy, guide
        self.setting = {"top_p": top_p, "min_tokens": min_tokens, "temperature": temperature, "banned": policy.banned}
        self.lm, self.tokenizer, self.banned, self.step = policy.lm, policy.tokenizer, policy.banned, policy.step

    @property
    def context_length(self) -> int | None:
        return self.policy.context_length

    @property
    def shares_rows(self) -> bool:
        return can_share_rows(self.policy)

    def forward(self, batch: Batch, *, temperature: float, ban: bool = True) -> tuple[Tensor, None]:
        """Log-probs (N, R) of the response tokens within the mask; nats, 0 outside `batch.response_mask`.

        Raises ValueError for another temperature than that of the mask.
        """
        if temperature != self.setting["temperature"]:
            raise ValueError(f"the mask is of temperature {self.setting['temperature']}, log-probs are asked for at {temperature}")
        layout, mask = lay_out(self.policy, batch), batch.response_mask
        at = layout.state_index[:, :-1][mask]
        hidden, head = self.policy._hidden(layout)
        with torch.no_grad():
            guide, guide_head = self.guide._hidden(layout)
        flat = (hidden.flatten(0, 1)[at], batch.response_ids[mask], guide.flatten(0, 1)[at])
        found = masked_token_logprobs(*flat, head, guide_head, **self.setting)
        return found.new_zeros(mask.shape).masked_scatter(mask, found), None

    def decoder(self, *args: Any, **kwargs: Any) -> "MaskedDecoder":
        """What `sample` decodes with."""
        return MaskedDecoder(self, *args, **kwargs)

    def masked(self, logits: Tensor, guide_logits: Tensor) -> Tensor:
        """The logits (n, V) outside of the guide's nucleus are as good as -inf."""
        return logits.float().masked_fill(~nucleus(guide_logits, **self.setting), LOWEST)


class MaskedDecoder:
    """Two decoders in step, the policy's and its guide's, that read the same tokens; its logits are the masked ones."""

    def __init__(self, masked: MaskedPolicy, *args: Any, **kwargs: Any) -> None:
        self.masked = masked
        self.first, self.second = Decoder(masked.policy, *args, **kwargs), Decoder(masked.guide, *args, **kwargs)
        self.logits = masked.masked(self.first.logits, self.second.logits)
        del self.first.logits, self.second.logits

    @property
    def places(self) -> Tensor:
        return self.first.places

    def step(self, tokens: Tensor) -> Tensor:
        return self.masked.masked(self.first.step(tokens), self.second.step(tokens))

    def moved(self) -> None:
        self.first.moved()
        self.second.moved()

    def keep(self, index: Tensor, places: Tensor) -> None:
        self.first.keep(index, places)
        self.second.keep(index, places)
