"""Tokens that say how good a response is to be: added to a policy, and put in front of prompts."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.batch import Batch
from lit_rlhf.networks import CausalPolicy


def token_names(k: int) -> list[str]:
    """<|quantile_0|>, the worst, to <|quantile_{k-1}|>."""
    return [f"<|quantile_{i}|>" for i in range(k)]


def add_quantile_tokens(tokenizer: Any, k: int) -> list[int]:
    """The ids of the k tokens in the tokenizer, which gets those that it lacks. Raises ValueError where it has others than k."""
    names = token_names(k)
    had = [name for name in tokenizer.get_vocab() if re.fullmatch(r"<\|quantile_\d+\|>", name)]
    if had and set(had) != set(names):
        raise ValueError(f"the tokenizer has {len(had)} quantile tokens; give num_quantiles: {len(had)}, as in the run that made it")
    tokenizer.add_special_tokens({"extra_special_tokens": names}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(names)  # type: ignore[no-any-return]


def with_tokens(policy: CausalPolicy, tokenizer: Any, ids: Sequence[int]) -> CausalPolicy:
    """The policy with room for these ids of `tokenizer`, which it never samples; new rows of its tables are drawn like the others."""
    lm, old = policy.lm, policy.lm.get_input_embeddings().weight.shape[0]
    if max(ids) >= old:
        lm.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        with torch.no_grad():
            for table in {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}:
                table[old:] = table[:old].mean(0) + table[:old].std(0) * torch.randn_like(table[old:])
    made = CausalPolicy(lm, tokenizer)
    made.form, made.own_logits = policy.form, policy.own_logits
    made.banned[torch.tensor(list(ids))] = True
    return made


def conditioned(batch: Batch, tokens: Tensor, bos: int | None) -> Batch:
    """The batch with one more token (M,) at the start of each prompt, after BOS where it begins with that."""
    ids, mask = batch.prompt_ids, batch.prompt_mask
    tokens = tokens.to(ids.device)
    starts = (ids[:, 0] == bos) if bos is not None else torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    first = torch.where(starts, ids[:, 0], tokens)[:, None]
    second = torch.where(starts, tokens, ids[:, 0])[:, None]
    return replace(batch, prompt_ids=torch.cat([first, second, ids[:, 1:]], 1), prompt_mask=torch.cat([mask[:, :1], mask], 1))


def one_each(batch: Batch) -> Batch:
    """The batch with a prompt of its own for every response, without columns."""
    rows = torch.arange(batch.num_responses, device=batch.prompt_of.device)
    owner = batch.prompt_of
    return Batch(batch.prompt_ids[owner], batch.prompt_mask[owner], batch.response_ids, batch.response_mask, rows)
