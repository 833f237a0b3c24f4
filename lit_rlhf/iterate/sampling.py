"""What will be labelled: responses of several policies to a round's prompts, and the pairs of them that are asked about."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch

from lit_rlhf import cli
from lit_rlhf.data.collate import collate
from lit_rlhf.data.loader import permutation, rolling
from lit_rlhf.data.text import tidy_response
from lit_rlhf.functional import preference_spread
from lit_rlhf.generation import sample
from lit_rlhf.iterate.rounds import Row
from lit_rlhf.modules import PPO
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.scorers import load_scorer

POLICIES = ("zero-shot", "sft", "current", "reference")
NOISE, PROMPTS, PAIRS, SIDES = 0x4954, 0x4955, 0x4956, 0x4957  # keys of what is drawn
MAX_ROWS = 256  # responses sampled at a time
Choice = tuple[int, int, int]
"""A row, and the positions of two of its responses."""


def prepared(args: Sequence[str], members: int = 1) -> Any:
    """Trainer, module and data of PPO's command line, its prompts read.

    Raises ValueError for what is no PPO, has no prompts, or asks of an ensemble of `members` what it cannot do.
    """
    run = cli.build(args)
    if not isinstance(run.model, PPO):
        raise ValueError(f"--ppo configures a {type(run.model).__name__}; give a PPO's YAML file")
    if members > 1 and run.model.reward_baseline == "none":
        raise ValueError(f"--ppo sets reward_baseline: none, but each of --members {members} subtracts its own mean; leave one of them out")
    run.datamodule.trainer = SimpleNamespace(lightning_module=run.model)
    run.datamodule.setup("fit")
    if "train" not in run.datamodule.tables:
        raise ValueError("--ppo has no prompts to ask about (data.data is null); give it data")
    return run


def round_rows(total: int, number: int, size: int, apart: int, seed: int) -> list[int]:
    """The rows of the round's prompts: first `apart` that are held out, then `size - apart` to learn from.

    A share apart/size of all `total` rows is held out for good, so that no round learns from a prompt that another round tests on. Both
    parts are walked through in endless permutations, a function of the seed. Raises ValueError for more prompts than there are.
    """
    if size > total:
        raise ValueError(f"--prompts is {size}, but the data of --ppo has {total} prompts; lower it")
    order = permutation(total, seed, PROMPTS).tolist()
    cut = round(total * apart / size)

    def walk(part: list[int], count: int, *key: int) -> list[int]:
        return [part[i] for i in rolling(len(part), (number - 1) * count, count, seed, PROMPTS, *key)] if count else []

    return walk(order[:cut], apart, 1) + walk(order[cut:], size - apart, 2)


@torch.no_grad()
def respond(run: Any, policies: Mapping[str, str], rows: Sequence[int], n: int, key: Sequence[int]) -> list[Row]:
    """n responses of each policy (name -> directory) to each of these training rows, and the row's own reference where it has one.

    One dictionary a prompt: row, prompt, columns, and `responses` as [policy, text]; responses that are empty or were there already are
    left out. The noise depends on `key`, the policy's name and the row, whatever the batches. Policies are loaded one at a time.
    """
    table, module, device = run.datamodule.tables["train"], run.model, run.trainer.strategy.root_device
    found: list[Row] = []
    for prompt, columns in _columns(collate(table.fetch(rows)).columns):
        found.append({"row": rows[len(found)], "prompt": prompt, "columns": columns, "responses": []})
    size = max(1, MAX_ROWS // n)
    for name, where in policies.items():
        policy = CausalPolicy.load(where, tokenizer=module.tokenizer, **module.loading, **module.source).eval().to(device)
        for at in range(0, len(rows), size):
            part = list(rows[at : at + size])
            with run.trainer.precision_plugin.forward_context():
                noise = (*key, NOISE, POLICIES.index(name))
                made = sample(policy, collate(table.fetch(part)).to(device), module.sampling, num_responses=n, key=noise, rows=part)
            for i, text in enumerate(made.texts):
                found[at + i // n]["responses"].append([name, text])
    for row in found:
        reference = row["columns"].get("reference")
        if reference:
            row["responses"].append(["reference", tidy_response(reference) if row["prompt"].endswith("TL;DR:") else reference])
        row["responses"] = list({text.strip(): [name, text] for name, text in reversed(row["responses"]) if text.strip()}.values())[::-1]
    return found


def _columns(columns: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(prompt, the other columns) of each prompt of a batch."""
    names = [name for name in columns if name != "prompt"]
    return [(prompt, {name: columns[name][m] for name in names}) for m, prompt in enumerate(columns["prompt"])]


def random_pairs(rows: Sequence[Row], count: int, key: Sequence[int]) -> list[Choice]:
    """`count` pairs of responses to one prompt each, drawn by `key`: every prompt once before any twice."""
    queues = []
    for m in permutation(len(rows), *key, PAIRS).tolist():
        pairs = list(combinations(range(len(rows[m]["responses"])), 2))
        queues.append([(m, *pairs[q]) for q in permutation(len(pairs), *key, PAIRS, rows[m]["row"])])
    turns = range(max(map(len, queues), default=0))
    return [queue[turn] for turn in turns for queue in queues if turn < len(queue)][:count]


def most_disputed(rows: Sequence[Row], rewards: Sequence[str], count: int, device: Any = "cpu") -> list[Choice]:
    """The `count` pairs of responses to one prompt each that these reward models (directories) disagree about most."""
    prompts = [row["prompt"] for row in rows for _ in row["responses"]]
    texts = [text for row in rows for _, text in row["responses"]]
    scores = torch.stack([load_scorer(where).to(device)(prompts, texts, {}).cpu() for where in rewards])
    choices, pairs, first = list[Choice](), list[tuple[int, int]](), 0
    for m, row in enumerate(rows):
        for i, j in combinations(range(len(row["responses"])), 2):
            choices.append((m, i, j))
            pairs.append((first + i, first + j))
        first += len(row["responses"])
    one, other = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)
    order = preference_spread(scores[:, one], scores[:, other]).argsort(descending=True, stable=True)
    return [choices[q] for q in order[:count].tolist()]


def asked(rows: Sequence[Row], choices: Sequence[Choice], number: int, held_out: bool, key: Sequence[int], begin: int = 0) -> list[Row]:
    """The chosen pairs as rows, which of the two stands first drawn by `key`; ids count from `begin`."""
    made = []
    for q, (m, i, j) in enumerate(choices):
        row = rows[m]
        sides = [(i, j), (j, i)][permutation(2, *key, SIDES, row["row"], i, j)[0]]
        (one, first), (other, second) = (row["responses"][side] for side in sides)
        pair = {"id": f"{number}-{begin + q}", "row": row["row"], "prompt": row["prompt"], "first": first, "second": second}
        made.append(pair | {"policies": [one, other], "held_out": held_out})
    return made


def choose(
    rows: Sequence[Row], number: int, held_out: int, count: int, rewards: Sequence[str], key: Sequence[int], device: Any
) -> list[Row]:
    """The round's pairs: one at random of each of the first `held_out` prompts, and `count` of the others.

    Of the others the most disputed where `rewards` names reward models, else at random. What is held out is always random, so that the
    accuracy on it can be compared between rounds. Raises ValueError where no prompt has two different responses.
    """
    apart, rest = rows[:held_out], rows[held_out:]
    picked = most_disputed(rest, rewards, count, device) if rewards else random_pairs(rest, count, key)
    tested = random_pairs(apart, len(apart), (*key, 1))
    if not picked:
        raise ValueError(
            f"round {number}: no prompt has two different responses to compare; raise --responses, or the sampling temperature"
        )
    return asked(rest, picked, number, False, key) + asked(apart, tested, number, True, key, len(picked))
