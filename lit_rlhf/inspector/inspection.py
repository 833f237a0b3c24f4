"""What PPO's rollout says of each token of one response: log-probs, KL, reward, value, advantage."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_rlhf.batch import Batch
from lit_rlhf.data.text import tidy_response
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.functional import k1
from lit_rlhf.generation import Sampling, check_context
from lit_rlhf.inspector.colours import fragment
from lit_rlhf.report import Markup, Plot, Report, Series
from lit_rlhf.rollout import Actors, Rollout, Shaping, collect, score_texts, shape


@dataclass(frozen=True)
class Inspection:
    """One response's numbers, a list entry per token; a notebook shows it in colours."""

    prompt: str
    response: str
    ids: list[int]
    tokens: list[str]
    """Each token's own text; special tokens by their names."""
    special: list[bool]
    columns: dict[str, list[float]]
    """See colours.COLUMNS; without a value network there is no "value"."""
    score: float
    """The reward model's or function's; 0 without one."""
    shaped_score: float
    """What stands on the last token: the score, or what replaces it where the response did not end."""
    finished: bool
    """Ended by EOS or a stop string."""
    settings: dict[str, float] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        return fragment(self)

    def report(self) -> Report:
        """The same as a page, with plots over the tokens."""
        data = {
            name: getattr(self, name) for name in ("prompt", "response", "ids", "tokens", "score", "shaped_score", "finished", "settings")
        }
        report = Report("Token by token", data=data | {"columns": self.columns})
        report.add("Response", Markup(fragment(self), self.columns))
        report.add("Over the response", *plots(self.columns))
        return report


def plots(columns: dict[str, list[float]]) -> list[Plot]:
    """Log-probs, and value against return, over the tokens."""
    x = list(range(1, len(columns["kl"]) + 1))

    def plot(title: str, unit: str, **names: str) -> Plot:
        return Plot(title, "token", unit, [Series(label, x, columns[name]) for name, label in names.items() if name in columns])

    return [
        plot("Log-probs", "nats", logprob="policy", ref_logprob="reference"),
        plot("KL", "nats", kl=""),
        plot("Value and return", "score", value="value", **{"return": "return"}),
    ]


@torch.no_grad()
def inspect_response(
    actors: Actors,
    prompt: str | Batch,
    response: str | None = None,
    *,
    sampling: Sampling | None = None,
    kl_coef: float = 0.05,
    shaping: Shaping | None = None,
    seed: int = 0,
) -> Inspection:
    """Looks at one response of `actors.policy` as PPO would.

    Args:
        prompt: a text, or a Batch of one prompt with the data's columns.
        response: its text; None samples one.
        sampling: its temperature holds for all log-probs; default that of PPO.
        shaping: default that of PPO with a reward model (a response that does not end has the score -1), advantages not whitened: one
            response's mean and variance are not the iteration's.
        seed: of the sampling noise.

    Raises ValueError for networks with different tokenizers, and where prompt and response exceed the context.
    """
    sampling, shaping = sampling or Sampling(), shaping or Shaping(no_eos_score=-1.0, whiten_advantages=False)
    check_tokenizers(actors)
    tokenizer = actors.policy.tokenizer
    batch = prompt_batch(tokenizer, prompt) if isinstance(prompt, str) else prompt.select_prompts([0])
    made = collect(actors, batch, sampling, key=(seed,)) if response is None else measure(actors, batch, response, sampling)
    experience, _ = shape(made, kl_coef, shaping)
    mask, ids = made.batch.response_mask[0], made.batch.response_ids[0]
    found = {
        "logprob": made.logprobs,
        "ref_logprob": made.ref_logprobs,
        "kl": k1(made.logprobs, made.ref_logprobs),
        "reward": experience.rewards,
        "value": made.values,
        "advantage": experience.advantages,
        "return": experience.returns,
    }
    kept = ids[mask].tolist()
    return Inspection(
        batch.columns["prompt"][0],
        made.texts[0],
        kept,
        token_texts(tokenizer, kept),
        [i in tokenizer.all_special_ids for i in kept],
        {name: x[0][mask].tolist() for name, x in found.items() if name != "value" or actors.value is not None},
        float(made.scores[0]),
        float(experience.scores[0]),
        bool(made.finished[0]),
        {"kl_coef": kl_coef, "temperature": sampling.temperature, "gamma": shaping.gamma, "lam": shaping.lam},
    )


def measure(actors: Actors, batch: Batch, response: str, sampling: Sampling) -> Rollout:
    """What the networks say of a given response to the batch's one prompt, as `collect` does of a sampled one."""
    prompt, temperature = batch.columns["prompt"][0], sampling.temperature or 1.0
    encoder = Encoder(actors.policy.tokenizer)
    text = tidy_response(response) if prompt.endswith("TL;DR:") else response
    ids = torch.tensor([encoder.response(encoder.ids([text])[0])])
    check_context(actors.policy, batch, Sampling(max_new_tokens=ids.shape[1]))
    device = next(actors.policy.parameters()).device
    batch = batch.with_responses(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([0])).to(device)
    logprobs = actors.policy(batch, temperature=temperature, ban=True)[0].float().cpu()
    ref_logprobs = actors.ref_logprobs(batch, temperature).float().cpu()
    values = torch.zeros_like(logprobs) if actors.value is None else actors.value(batch)[:, :-1].float().cpu()
    batch = batch.to("cpu")
    scores = score_texts(actors.scorer, batch, [text]).float().cpu()
    unseen = torch.zeros_like(logprobs)  # entropy: the inspector shows none
    return Rollout(batch, [text], torch.tensor([True]), logprobs, logprobs, ref_logprobs, values, unseen, scores)


def prompt_batch(tokenizer: Any, prompt: str) -> Batch:
    """A Batch of this one prompt."""
    encoder = Encoder(tokenizer)
    return Batch.of([encoder.prompt(encoder.ids([prompt])[0]) or encoder.start], columns={"prompt": [prompt]})


def check_tokenizers(actors: Actors) -> None:
    """Raises ValueError where reference or value network number tokens otherwise than the policy: their outputs would mean nothing."""
    own = actors.policy.tokenizer.get_vocab()
    for role in ("reference", "value"):
        network = getattr(actors, role)
        if network is not None and network.tokenizer.get_vocab() != own:
            raise ValueError(
                f"the {role} network has another tokenizer than the policy, so its numbers would belong to other tokens; give networks "
                "that come from the same SFT model (a reward model may have a tokenizer of its own, the others not)"
            )


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's own part of the text; a token that is part of a character is shown as the tokenizer's vocabulary has it."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        after = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = after[len(before) :]
        whole = after.startswith(before) and piece and "\N{REPLACEMENT CHARACTER}" not in piece
        texts.append(piece if whole else str(tokenizer.convert_ids_to_tokens(int(ids[end - 1]))))
        before = after
    return texts
