"""What the doctor examines: directories, data, and what is made of them once and used by many checks."""

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_rlhf.batch import Batch
from lit_rlhf.data.schemas import PAIR_SCHEMAS, PROMPT_SCHEMAS, SFT_SCHEMAS, Fields, Schema, examples
from lit_rlhf.data.sources import Part, open_source
from lit_rlhf.data.table import Table, build_table
from lit_rlhf.data.tokenise import Encoder, Settings
from lit_rlhf.doctor.finding import NotMeasurable
from lit_rlhf.generation import Sampling
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.rollout import Actors, Rollout, collect
from lit_rlhf.scorers import is_import_path, load_scorer

HELD_OUT = {"validation", "valid", "val", "test", "held", "heldout", "eval", "dev"}
NOISE = 0x646F63  # key of the sampling noise
SHORTEST_LIMIT = 53  # new tokens, PPO's own default


@dataclass
class Rows:
    """One split of one source: its tokenised rows, what kind they are, and whether its name says that it is held out."""

    name: str
    kind: str
    """"pairs", "references" (prompts with a response) or "prompts"."""
    held_out: bool
    table: Table


@dataclass
class Pairs:
    """Comparisons as texts: the preferred response, the other one, and the number of the row (the prompt) that each pair is from."""

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    rows: Tensor
    source: str


@dataclass
class Case:
    """One hand-over to examine.

    Args:
        sft: the SFT stage's directory or hub name, or a CausalPolicy as it would train.
        reward: the reward model's directory or hub name, a ScalarModel, a reward function, or a function's import path.
        data: files, folders, hub names or lists of rows: comparisons, prompts with references, prompts.
        policy: the PPO stage's directory, or a CausalPolicy.
        base: the language model that SFT began from.
        temperature: of the samples, as in PPO.
        max_new_tokens: of the samples; None takes the longest reference but for 1%, and at least 53.
        max_prompt_tokens: prompts are cut to it as in training.
        rows: how many held-out rows each measurement takes. limit_rows: how many rows of each file are read.
        device, dtype: where and in what the networks run.
    """

    sft: Any
    reward: Any
    data: Sequence[Any]
    policy: Any = None
    base: str | None = None
    temperature: float = 0.7
    max_new_tokens: int | None = None
    max_prompt_tokens: int = 512
    rows: int = 256
    limit_rows: int = 20000
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    # Networks

    @property
    def directories(self) -> dict[str, str]:
        """Role -> directory or hub name, of those that are one."""
        given = {"sft": self.sft, "reward": self.reward, "policy": self.policy, "base": self.base}
        return {role: path for role, path in given.items() if isinstance(path, str) and not is_import_path(path)}

    @cached_property
    def policy_net(self) -> CausalPolicy:
        """The SFT model as PPO's policy: in training mode, as in its rollouts and updates."""
        return self._causal(self.sft).train()

    @cached_property
    def reference(self) -> CausalPolicy:
        """The SFT model as PPO's frozen reference."""
        return (copy.deepcopy(self.sft) if isinstance(self.sft, CausalPolicy) else self._causal(self.sft)).eval()

    @cached_property
    def trained(self) -> CausalPolicy:
        """The policy that PPO left."""
        if self.policy is None:
            raise NotMeasurable("no --policy was given")
        return self._causal(self.policy).eval()

    def _causal(self, source: Any) -> CausalPolicy:
        network = source if isinstance(source, CausalPolicy) else CausalPolicy.load(source, dtype=self.dtype)
        return network.to(self.device)

    @cached_property
    def scorer(self) -> nn.Module:
        """The reward as PPO calls it."""
        return load_scorer(self.reward, **({"dtype": self.dtype} if isinstance(self.reward, str) else {})).to(self.device)

    @property
    def network(self) -> ScalarModel:
        """The reward model's network."""
        network = getattr(self.scorer, "network", None)
        if network is None:
            raise NotMeasurable("the reward is a function, not a reward model")
        return network

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.policy_net.tokenizer)

    # Data

    @cached_property
    def splits(self) -> list[Rows]:
        """Every split of every source, tokenised by the SFT model's tokenizer."""
        return [rows for source in self.data for rows in self._read(source)]

    def _read(self, source: Any) -> list[Rows]:
        parts, label = open_source(source), source if isinstance(source, str) else "data"
        return [self._rows(part, label if split == "" else f"{label}:{split}") for split, part in parts.items()]

    def _rows(self, part: Part, name: str) -> Rows:
        schema = _schema(part)
        kind = "pairs" if schema in PAIR_SCHEMAS else "references" if schema in SFT_SCHEMAS else "prompts"
        settings = Settings(max_prompt_tokens=self.max_prompt_tokens, overlong="left", on_bad_row="skip", prompts_only=kind == "prompts")
        table = build_table(part, (schema,), settings, self.encoder, self.limit_rows)
        words = set(Path(name).name.lower().replace(".", "_").replace("-", "_").replace(":", "_").split("_"))
        return Rows(name, kind, bool(words & HELD_OUT), table)

    def pick(self, kinds: Sequence[str]) -> Rows:
        """The split to measure on: of the first kind that there is, a held-out one if possible, and with the most rows."""
        for kind in kinds:
            found = [rows for rows in self.splits if rows.kind == kind]
            if found:
                return max(found, key=lambda r: (r.held_out, min(len(r.table), self.rows)))
        raise NotMeasurable(f"no --data file has {' or '.join(kinds)}")

    def draw(self, rows: Rows) -> list[dict[str, Any]]:
        """At most `self.rows` of its rows, drawn by the seed."""
        order = np.random.default_rng(self.seed).permutation(len(rows.table))[: self.rows]
        return rows.table.fetch(sorted(order.tolist()))

    @cached_property
    def references(self) -> tuple[list[str], list[str], str]:
        """Prompts with reference responses (of comparisons: the preferred ones), as texts, and where they are from."""
        found = self.pick(("references", "pairs"))
        rows = self.draw(found)
        best = [row["pairs"][0][0] if row["pairs"] else 0 for row in rows]
        return [row["prompt"] for row in rows], self.texts([r["responses"][i] for r, i in zip(rows, best, strict=True)]), found.name

    @property
    def prompts(self) -> list[str]:
        """What samples are drawn for: the references' prompts, or prompts alone where there are no references."""
        try:
            return self.references[0]
        except NotMeasurable:
            return [row["prompt"] for row in self.draw(self.pick(("prompts",)))]

    @cached_property
    def pairs(self) -> Pairs:
        """Comparisons without ties."""
        found = self.pick(("pairs",))
        pairs = []
        for number, row in enumerate(self.draw(found)):
            texts, target = self.texts(row["responses"]), row["target"] or [1.0] * len(row["pairs"])
            better = [(i, j) if t > 0.5 else (j, i) for (i, j), t in zip(row["pairs"], target, strict=True) if t != 0.5]
            pairs += [(row["prompt"], texts[i], texts[j], number) for i, j in better if texts[i] != texts[j]]
        if not pairs:
            raise NotMeasurable(f"{found.name} has no pair that is not a tie")
        prompts, chosen, rejected, rows = map(list, zip(*pairs, strict=True))
        return Pairs(prompts, chosen, rejected, torch.tensor(rows), found.name)

    def texts(self, ids: list[list[int]]) -> list[str]:
        return self.policy_net.tokenizer.batch_decode(ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    # What the models make of it

    @property
    def sampling(self) -> Sampling:
        """How the samples are drawn."""
        if self.max_new_tokens is not None:
            return Sampling(self.max_new_tokens, self.temperature)
        longest = int(np.percentile(self.pick(("references", "pairs", "prompts")).table.longest, 99))
        context = self.policy_net.context_length
        room = None if context is None else context - max(self.encoder.sizes(self.prompts))
        wanted = max(longest, SHORTEST_LIMIT)
        return Sampling(min(wanted, room or wanted), self.temperature)

    @cached_property
    def rollout(self) -> Rollout:
        """PPO's first rollout on the held-out prompts, with a score of 0."""
        return self._collect(self.policy_net)

    @cached_property
    def trained_rollout(self) -> Rollout:
        """The trained policy's on the same prompts with the same noise."""
        return self._collect(self.trained)

    def _collect(self, policy: CausalPolicy) -> Rollout:
        prompts = self.prompts
        batch = Batch.of([self.encoder.prompt(ids) for ids in self.encoder.ids(prompts)], columns={"prompt": prompts})
        return collect(Actors(policy, self.reference, None, _NoReward()), batch, self.sampling, key=(self.seed, NOISE))

    @cached_property
    def pair_scores(self) -> tuple[Tensor, Tensor]:
        """The scores of the pairs' preferred and other responses, (Q,) each."""
        pairs = self.pairs
        scores = self.score(pairs.prompts * 2, pairs.chosen + pairs.rejected)
        return scores[: len(pairs.chosen)], scores[len(pairs.chosen) :]

    @cached_property
    def kinds(self) -> dict[str, Tensor]:
        """Scores of five kinds of responses to the same prompts, (M,) each."""
        prompts, references, _ = self.references
        rng = random.Random(self.seed)
        kinds = {
            "reference": references,
            "sample": self.rollout.texts,
            "other": references[1:] + references[:1],
            "truncated": [_truncated(text) for text in references],
            "shuffled": [_shuffled(text, rng) for text in references],
        }
        return {name: self.score(prompts, texts) for name, texts in kinds.items()}

    def score(self, prompts: list[str], responses: list[str]) -> Tensor:
        """The reward's scores (N,), on the CPU."""
        return self.scorer(prompts, responses, {}).float().cpu()

    def lengths(self, texts: list[str]) -> Tensor:
        """Tokens of each text, by the SFT model's tokenizer, (N,)."""
        return torch.tensor([float(len(ids)) for ids in self.encoder.ids(texts)])


class _NoReward(nn.Module):
    def forward(self, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> Tensor:
        return torch.zeros(len(prompts))


def _schema(part: Part) -> Schema:
    """The schema of the split's rows; the readers' error where there is none."""
    known = [Fields(row, where, {}) for where, row in islice(part.rows(), 100) if isinstance(row, dict)]
    for schema in (*PAIR_SCHEMAS, *SFT_SCHEMAS, *PROMPT_SCHEMAS):
        if any(schema.matches(row) for row in known):
            return schema
    next(iter(examples(part.rows(), part.name, PROMPT_SCHEMAS)))
    raise ValueError(f"{part.name}: no row is an object with named fields")


def _truncated(text: str) -> str:
    """The first half of the words, with the text's own leading space."""
    words = text.split()
    return text[: len(text) - len(text.lstrip())] + " ".join(words[: max(1, len(words) // 2)])


def _shuffled(text: str, rng: random.Random) -> str:
    """The words in another order."""
    words = text.split()
    return text[: len(text) - len(text.lstrip())] + " ".join(rng.sample(words, len(words)))


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file; {} where the file is missing."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
