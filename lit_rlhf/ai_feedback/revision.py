"""Critique and revision of responses by written principles, as SFT data (Constitutional AI, Bai et al. 2022, arXiv:2212.08073, sec. 3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.ai_feedback.labels import read_objects
from lit_rlhf.batch import Batch
from lit_rlhf.data.loader import permutation
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.generation import Sampling, sample
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.winrate.judges import fill

Row = dict[str, Any]
DRAWN, CRITIQUES, REVISIONS = 0x4352, 0x4353, 0x4354  # keys of what is drawn
ROWS = 32  # questions answered at a time
CRITIQUE = (
    "Prompt:\n{prompt}\n\nResponse:\n{response}\n\nPrinciple:\n{principle}\n\n"
    "Say briefly in which ways the response goes against the principle.\n\nCritique:"
)
REVISION = (
    "Prompt:\n{prompt}\n\nResponse:\n{response}\n\nPrinciple:\n{principle}\n\nCritique:\n{critique}\n\n"
    "Rewrite the response so that it follows the principle and still answers the prompt. Give the new response alone.\n\nRevision:"
)
FIELDS = {"critique": ("{prompt}", "{response}", "{principle}"), "revision": ("{prompt}", "{response}", "{critique}")}


def read_responses(path: str | Path) -> list[Row]:
    """Rows with a prompt and a response (or label, completion, summary). Raises ValueError with file and line for another."""
    rows = []
    for where, row in read_objects(path):
        response = next((row[name] for name in ("response", "label", "completion", "summary") if name in row), None)
        if not isinstance(row.get("prompt"), str) or not isinstance(response, str) or not response.strip():
            raise ValueError(f'{where}: no text in "prompt" or in "response" (has: {", ".join(row)}); give what `predict` writes')
        rows.append({"prompt": row["prompt"], "response": response})
    return rows


def check_template(what: str, template: str) -> str:
    """The template; ValueError where a field is missing, without which the model would not see what it is asked about."""
    for field in FIELDS[what]:
        if field not in template:
            raise ValueError(f"the {what} template has no {field}: it needs {', '.join(FIELDS[what])}")
    return template


def ask(policy: CausalPolicy, questions: Sequence[str], sampling: Sampling, key: Sequence[int], rows: Sequence[int]) -> list[str]:
    """The model's answer to each question, stripped; through the tokenizer's chat template where it has one.

    The noise depends on `key` and each question's number in `rows`. Raises ValueError where a question does not fit in the context.
    """
    tokenizer, encoder = policy.tokenizer, Encoder(policy.tokenizer)
    if tokenizer.chat_template:
        asked = [[{"role": "user", "content": q}] for q in questions]
        questions = [str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in asked]
    ids = [encoder.prompt(found) for found in encoder.ids(questions)]
    longest, limit = max(map(len, ids)), policy.context_length
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"a question of {longest} tokens and {sampling.max_new_tokens} new ones do not fit in the model's context of {limit}; "
            "lower --max_new_tokens, shorten the template, or use a model with a longer one"
        )
    device, answers = next(policy.parameters()).device, list[str]()
    for at in range(0, len(ids), ROWS):
        made = sample(policy, Batch.of(ids[at : at + ROWS]).to(device), sampling, key=key, rows=rows[at : at + ROWS])
        answers += [text.strip() for text in made.texts]
    return answers


def revise(
    policy: CausalPolicy,
    rows: Sequence[Row],
    principles: Sequence[str],
    sampling: Sampling,
    *,
    rounds: int = 1,
    seed: int = 0,
    critique: str = CRITIQUE,
    revision: str = REVISION,
) -> list[Row]:
    """Criticises and rewrites each response `rounds` times, each time by another of the principles, drawn by the seed.

    Returns rows that an SFTDataModule reads: prompt, label (the last revision, with the response's own leading blanks), and beside them
    original, principles, critiques, revisions. A row whose revisions are all empty, or say what was there, is left out: it teaches nothing.
    """
    check_template("critique", critique), check_template("revision", revision)
    turns = [permutation(len(principles), seed, DRAWN, i).tolist() for i in range(len(rows))]
    current, numbers = [row["response"].strip() for row in rows], list(range(len(rows)))
    logs: list[dict[str, list[str]]] = [{"principles": [], "critiques": [], "revisions": []} for _ in rows]
    for turn in range(rounds):
        chosen = [principles[order[turn % len(principles)]] for order in turns]
        parts = [
            {"{prompt}": row["prompt"].strip(), "{response}": now, "{principle}": principle}
            for row, now, principle in zip(rows, current, chosen, strict=True)
        ]
        said = ask(policy, [fill(critique, part) for part in parts], sampling, (seed, CRITIQUES, turn), numbers)
        parts = [part | {"{critique}": text} for part, text in zip(parts, said, strict=True)]
        new = ask(policy, [fill(revision, part) for part in parts], sampling, (seed, REVISIONS, turn), numbers)
        for log, *entry in zip(logs, chosen, said, new, strict=True):
            for name, text in zip(log, entry, strict=True):
                log[name].append(text)
        current = [text or before for text, before in zip(new, current, strict=True)]
    made = []
    for row, now, log in zip(rows, current, logs, strict=True):
        original = row["response"]
        if now != original.strip():
            blanks = original[: len(original) - len(original.lstrip())]
            made.append({"prompt": row["prompt"], "label": blanks + now, "original": original, **log})
    return made
