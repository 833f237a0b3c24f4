"""Best-of-n: sample n responses to each prompt and keep the one that the reward likes best; no training, and a yardstick for PPO."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.batch import Batch
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.functional import best_of_n_kl
from lit_rlhf.generation import Sampling, sample
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.rollout import score_texts
from lit_rlhf.scorers import load_scorer

NOISE = 0x626F6E  # key of the sampling noise
MAX_ROWS = 256


@dataclass
class Candidates:
    """The n responses to each of M prompts and what the reward thinks of them."""

    texts: list[list[str]]
    """M lists of n."""
    scores: Tensor
    """(M, n) float32."""
    finished: Tensor
    """(M, n) bool."""
    lengths: Tensor
    """(M, n) int64 tokens, EOS included."""

    @property
    def best(self) -> Tensor:
        """(M,) int64: which of the n scores highest, the first of equal ones."""
        return self.scores.argmax(1)


@torch.no_grad()
def candidates(
    policy: CausalPolicy, scorer: nn.Module, prompts: Batch, sampling: Sampling, n: int, key: Sequence[int] = (0,)
) -> Candidates:
    """Samples n responses for each prompt of the batch (whose columns the scorer may ask for) and scores them.

    The noise is a function of `key` and the prompt's row. At most `MAX_ROWS` responses are sampled at a time.
    """
    device, size = next(policy.parameters()).device, max(1, MAX_ROWS // n)
    rows, texts, parts = list(prompts.rows or range(prompts.num_prompts)), [], []
    for at in range(0, prompts.num_prompts, size):
        index = list(range(at, min(at + size, prompts.num_prompts)))
        part = prompts.select_prompts(index).to(device)
        made = sample(policy, part, sampling, num_responses=n, key=(*key, NOISE), rows=[rows[i] for i in index])
        scores = score_texts(scorer, made.batch, made.texts)
        texts += [made.texts[i * n : (i + 1) * n] for i in range(len(index))]
        parts.append([x.cpu().view(-1, n) for x in (scores.float(), made.finished, made.batch.response_mask.sum(1))])
    return Candidates(texts, *(torch.cat(column) for column in zip(*parts, strict=True)))


def best_rows(columns: dict[str, list[Any]], found: Candidates) -> list[dict[str, Any]]:
    """One dictionary a prompt: the best response with its score, what is known of the prompt, the mean score of all n, the bound of KL."""
    n, best = found.scores.shape[1], found.best.tolist()
    rows = []
    for m, k in enumerate(best):
        row = {"prompt": columns["prompt"][m], "response": found.texts[m][k]}
        if "reference" in columns:
            row["reference"] = columns["reference"][m]
        row |= {"score": float(found.scores[m, k]), "mean_score": float(found.scores[m].mean()), "length": int(found.lengths[m, k])}
        rows.append(row | {"n": n, "kl_bound": best_of_n_kl(n)})
    return rows


def best_of_n(
    policy: Any, reward: Any, prompts: Sequence[str], n: int = 16, sampling: Sampling | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The best of n responses to each prompt, by the reward: one dictionary a prompt, as `predict` writes them (`best_rows`).

    Args:
        policy: a directory, a hub name or a CausalPolicy.
        reward: a reward model's directory or hub name, a ScalarModel, a reward function or its import path.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    network = (policy if isinstance(policy, CausalPolicy) else CausalPolicy.load(policy)).eval()
    encoder = Encoder(network.tokenizer)
    batch = Batch.of([encoder.prompt(ids) or encoder.start for ids in encoder.ids(prompts)], columns={"prompt": list(prompts)})
    return best_rows(batch.columns, candidates(network, load_scorer(reward), batch, sampling or Sampling(), n, (seed,)))
