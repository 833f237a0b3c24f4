"""Judges: a reward model, a local causal language model, or a function; each says which response of a pair is better, or cannot."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_rlhf.batch import Batch
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.directories import load_config
from lit_rlhf.networks import CausalPolicy, in_parts
from lit_rlhf.scorers import imported, is_import_path, load_scorer
from lit_rlhf.winrate.pairs import Pair

TEMPLATE = (
    "Which of two responses to a prompt is better?\n\nPrompt:\n{prompt}\n\nResponse A:\n{first}\n\nResponse B:\n{second}\n\n"
    "Answer with A or B. The better response is Response"
)
ANSWERS = ("A", "B")
LEAST_MASS = 0.1
TOKENS = 16384  # of one forward pass


@dataclass
class Verdict:
    """What a judge says of one pair.

    `preferred` is the probability that the first response is the better one: 1, 0, 0.5 for a tie, or between; None where the judge
    gave no answer that counts. `orders` are the same for each order in which it was asked (first response first, first response second).
    """

    preferred: float | None
    orders: tuple[float | None, ...] = ()
    margin: float | None = None
    """The reward's difference, where the judge is one."""


Judge = Callable[[Sequence[Pair]], list[Verdict]]


def load_judge(name: Any, *, template: str = TEMPLATE, dtype: str = "float32", device: str = "cpu") -> Judge:
    """The judge that a directory, a hub name, an import path or a function is.

    A classifier's directory is a reward model, a causal language model's an LM that is asked. A function of (prompts, responses, …) is a
    reward function; one of (prompts, first, second), by these names, returns for each how probable it is that the first is better (0.5
    a tie, None no answer), and is asked in both orders. Raises ValueError for what is none of these.
    """
    function = imported(name) if isinstance(name, str) and is_import_path(name) else name
    if callable(function):
        return _function_judge(function)
    architecture = next(iter(load_config(name).architectures or []), "")
    if architecture.endswith("ForCausalLM") or architecture.endswith("LMHeadModel"):
        return LMJudge(CausalPolicy.load(name, dtype=dtype).eval().to(device), template)
    return reward_judge(load_scorer(name, dtype=dtype).to(device))


def _function_judge(function: Callable[..., Any]) -> Judge:
    if {"first", "second"} <= set(inspect.signature(function).parameters):
        return asked_in_both_orders(function)
    return reward_judge(load_scorer(function))


def reward_judge(scorer: Any) -> Judge:
    """The higher score wins; equal scores tie."""

    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        prompts, columns = [p.prompt for p in pairs], {n: [p.columns.get(n) for p in pairs] for n in pairs[0].columns}
        scores = [scorer(prompts, [getattr(p, side) for p in pairs], columns) for side in ("first", "second")]
        margins = (scores[0] - scores[1]).tolist()
        return [Verdict(0.5 if m == 0 else float(m > 0), margin=m) for m in margins]

    return judge


def asked_in_both_orders(function: Callable[..., Any]) -> Judge:
    """A judge of `function(prompts, first, second)`; ValueError for a wrong count or an answer outside of 0..1."""

    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        prompts, first, second = ([getattr(p, name) for p in pairs] for name in ("prompt", "first", "second"))
        orders = [_checked(function(prompts, *sides), len(pairs), function) for sides in ((first, second), (second, first))]
        return [combined(one, None if other is None else 1 - other) for one, other in zip(*orders, strict=True)]

    return judge


def _checked(answers: Any, count: int, function: Callable[..., Any]) -> list[float | None]:
    name = getattr(function, "__name__", type(function).__name__)
    if len(answers) != count:
        raise ValueError(f"judge {name} returned {len(answers)} answers for {count} pairs; it must return one for each")
    out = [None if a is None else float(a) for a in answers]
    for i, answer in enumerate(out):
        if answer is not None and not 0 <= answer <= 1:
            raise ValueError(
                f"judge {name} returned {answer:g} for pair {i}; give a probability that the first is better, or None for no answer"
            )
    return out


def combined(one: float | None, other: float | None) -> Verdict:
    """The verdict of both orders: a win or loss where they agree, a tie where they contradict each other, none where one says nothing."""
    if one is None or other is None:
        return Verdict(None, (one, other))
    agree = (one > 0.5) == (other > 0.5) and one != 0.5 and other != 0.5
    return Verdict(float(one > 0.5) if agree else 0.5, (one, other))


class LMJudge:
    """A causal language model asked which response is better, in both orders; the log-probabilities of its answers decide.

    Args:
        template: the question, with {prompt}, {first} and {second}; through the tokenizer's chat template where it has one.
        answers: what it may say for the first and the second.
        least_mass: an order in which the two answers together have a smaller probability counts as no answer: the judge would have
            said something else, and what it meant is not guessed.
    """

    def __init__(
        self, policy: CausalPolicy, template: str = TEMPLATE, answers: tuple[str, str] = ANSWERS, least_mass: float = LEAST_MASS
    ) -> None:
        for field in ("{prompt}", "{first}", "{second}"):
            if field not in template:
                raise ValueError(f"the judge's template has no {field}: it needs {{prompt}}, {{first}} and {{second}}")
        self.policy, self.template, self.answers, self.least_mass = policy, template, answers, least_mass
        self.encoder = Encoder(policy.tokenizer)

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair; ValueError where a question does not fit in the model's context."""
        one = self.ask([(p.prompt, p.first, p.second) for p in pairs])
        other = self.ask([(p.prompt, p.second, p.first) for p in pairs])
        return [combined(a, None if b is None else 1 - b) for a, b in zip(one, other, strict=True)]

    @torch.no_grad()
    def ask(self, questions: Sequence[tuple[str, str, str]]) -> list[float | None]:
        """P(first answer) / (P(first answer) + P(second answer)) of each question, or None where the two have too little mass."""
        prompts = [self.encoder.prompt(ids) for ids in self.encoder.ids([self._text(*q) for q in questions])]
        limit, longest = self.policy.context_length, max(map(len, prompts))
        chat = bool(self.policy.tokenizer.chat_template)
        answers = self.encoder.ids([a if chat else f" {a}" for a in self.answers])
        if limit is not None and longest + max(map(len, answers)) > limit:
            raise ValueError(
                f"a question of {longest} tokens does not fit in the judge's context of {limit}; use a judge with a longer one"
            )
        owner = [m for m in range(len(prompts)) for _ in answers]
        batch = Batch.of(prompts, answers * len(prompts), owner).to(next(self.policy.parameters()).device)
        found = in_parts(self.policy, batch, TOKENS, lambda b: self.policy(b)[0])
        first, second = (found * batch.response_mask).sum(1).double().exp().view(-1, 2).cpu().unbind(1)
        return [None if a + b < self.least_mass else a / (a + b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]

    def _text(self, prompt: str, first: str, second: str) -> str:
        parts = {"{prompt}": prompt.strip(), "{first}": first.strip(), "{second}": second.strip()}
        question = fill(self.template, parts)
        tokenizer = self.policy.tokenizer
        if not tokenizer.chat_template:
            return question
        return str(tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False))


def fill(template: str, parts: dict[str, str]) -> str:
    """The template with each field once in place of its name; what a response says in braces stays as it is."""
    out, rest = "", template
    while found := [(rest.index(name), name) for name in parts if name in rest]:
        at, name = min(found)
        out, rest = out + rest[:at] + parts[name], rest[at + len(name) :]
    return out + rest
