"""BestOfN: the best of n responses by a reward, as something that `predict` and `test` run. Nothing trains."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torchmetrics import MeanMetric

from lit_rlhf.batch import Batch
from lit_rlhf.best_of import best_rows, candidates
from lit_rlhf.data.loader import run_seed
from lit_rlhf.generation import Sampling
from lit_rlhf.modules.common import PREDICTION, as_sampling, record, reset_metrics
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.rollout import agree
from lit_rlhf.scorers import load_scorer
from lit_rlhf.scoring import check_reward_fn
from lit_rlhf.strategies import check_strategy


class BestOfN(L.LightningModule):
    """Samples n responses to each prompt and keeps the one that the reward likes best (Stiennon et al. 2020, G.3; Nakano et al. 2021).

    What PPO must beat: it costs no training, and its KL from the policy is at most log n - (n - 1)/n nats. `predict` writes the best
    response with its score; `test` logs `test/score`, `test/mean_score` (of all n), `test/length` and `test/kl_bound`. Needs a
    `PromptDataModule`.

    Args:
        model: the SFT directory or hub name.
        reward_model: a reward model's directory or hub name; or
        reward_fn: `reward_fn(prompts, responses, **columns)` -> one number per response; one of the two.
        n: responses per prompt.
        sampling: of the responses.
        dtype, attn_implementation, revision, trust_remote_code: as in `SFT`.
    """

    def __init__(
        self,
        model: str,
        *,
        reward_model: str | None = None,
        reward_fn: Callable[..., Any] | None = None,
        n: int = 16,
        sampling: Sampling = Sampling(),  # noqa: B008
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.sampling = as_sampling(sampling)
        record(self, self.sampling)
        if (reward_model is None) == (reward_fn is None):
            raise ValueError("give exactly one of reward_model and reward_fn" + (", not both" if reward_model else ""))
        if n < 1 or self.sampling.temperature <= 0:
            raise ValueError(
                f"best of n needs n of at least 1 and a temperature above 0, got n {n}, temperature {self.sampling.temperature}"
            )
        if reward_fn is not None:
            check_reward_fn(reward_fn)
        self.model, self.n, self.reward = check_source(model), n, reward_fn or check_source(str(reward_model))
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.policy: CausalPolicy | None = None
        self.scorer: torch.nn.Module | None = None
        self.metrics = torch.nn.ModuleDict({name: MeanMetric() for name in ("score", "mean_score", "length", "kl_bound")})
        self.samples: list[dict[str, Any]] = []
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model, **self.source)
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        return context_length_of(self.model, **self.source)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            raise ValueError("BestOfN trains nothing: use predict or test (or validate PPO, for its samples one by one)")
        check_strategy(self)

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = CausalPolicy.load(self.model, tokenizer=self.tokenizer, **self.loading, **self.source).requires_grad_(False)
            self.scorer = load_scorer(self.reward, **(self.loading if isinstance(self.reward, str) else {}))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a prompt: prompt, the best response, reference where known, score, mean_score, length, n, kl_bound."""
        found = agree(lambda: candidates(self.policy, self.scorer, batch, self.sampling, self.n, (run_seed(), PREDICTION)))
        return best_rows(batch.columns, found)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        rows = self.predict_step(batch, batch_idx)
        self.samples = rows if batch_idx == 0 else self.samples + rows
        for name, metric in self.metrics.items():
            metric.update(torch.tensor([float(row[name]) for row in rows], device=self.device))

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": metric.compute() for name, metric in self.metrics.items()})
        reset_metrics(*self.metrics.values())
