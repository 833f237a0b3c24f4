"""A small made-up forum: posts with five key facts, people who summarise them, and a gold reward known exactly.

The gold reward reads the facts out of the texts, so it holds for any pair of strings: a fact of the post that the summary
states is worth 1, a false one and a filler cost 1 each, and strange words, length and a missing end cost a little. People
forget facts, get them wrong and ramble; labellers rank summaries by the gold reward with Bradley-Terry noise. A policy that
imitates the people is therefore far from the best.
"""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lit_rlhf.data.text import format_tldr
from lit_rlhf.quickstart import words

KINDS = tuple(words.VALUES)
FACT, FALSEHOOD, FILLER, STRANGE_WORD, EXTRA_WORD, NO_END = 1.0, -1.0, -1.0, -0.25, -0.1, -0.5
ENOUGH = 20  # words; the longest plain summary of all five facts has 15
LOWEST = -5.0
CARE = 2.5  # of a labeller: the log-odds of the right choice, per point of gold
RANKED = 4  # people's summaries that a labeller compares at a time
STRAY, JUMBLED = 0.3, 0.1  # shares of the rankings with a fifth one, which is of another post, or whose words are in disorder


@dataclass(frozen=True)
class Post:
    """One post: `facts` are the key facts by kind, `others` the values its distracting sentences hold."""

    subreddit: str
    title: str
    text: str
    facts: dict[str, str]
    others: dict[str, str]


@dataclass(frozen=True)
class Person:
    """How someone summarises: the probability, per fact, to leave it out or get it wrong, and of each of two fillers."""

    omits: float
    errs: float
    rambles: float


# (share of all summaries, person)
PEOPLE = (
    (0.25, Person(omits=0.05, errs=0.00, rambles=0.05)),  # careful
    (0.35, Person(omits=0.40, errs=0.005, rambles=0.10)),  # hasty
    (0.15, Person(omits=0.15, errs=0.04, rambles=0.10)),  # muddled
    (0.25, Person(omits=0.15, errs=0.005, rambles=0.80)),  # chatty
)


def write_post(rng: random.Random) -> Post:
    """A post with one value of each kind, one or two distracting sentences, and the event before cause and wish or after."""
    facts = {kind: rng.choice(values) for kind, values in words.VALUES.items()}
    others = {kind: rng.choice([v for v in values if v != facts[kind]]) for kind, values in words.VALUES.items()}
    slots = {**facts, **{f"other_{kind}": value for kind, value in others.items()}}
    key = [rng.choice(words.EVENTS), rng.choice(words.CAUSES), rng.choice(words.WISHES)]
    if rng.random() < 0.3:
        rng.shuffle(key)
    sentences = key
    for extra in rng.sample(words.DISTRACTORS, rng.choice((1, 2))):
        sentences.insert(rng.randrange(len(sentences) + 1), extra)
    if rng.random() < 0.3:
        sentences.insert(0, rng.choice(words.OPENINGS))
    text = " ".join(sentences).format(**slots)
    told = {kind: value for kind, value in others.items() if f"{{other_{kind}}}" in " ".join(sentences)}
    return Post(rng.choice(words.SUBREDDITS), rng.choice(words.TITLES).format(**slots), text, facts, told)


def write_summary(post: Post, rng: random.Random, person: Person | None = None) -> str:
    """What a person (of random skill unless given) writes about the post, without leading space."""
    if person is None:
        person = rng.choices([p for _, p in PEOPLE], [share for share, _ in PEOPLE])[0]
    said: dict[str, str] = {}
    for kind, value in post.facts.items():
        if rng.random() < person.omits:
            continue
        if rng.random() < person.errs:
            value = post.others.get(kind) or rng.choice([v for v in words.VALUES[kind] if v != value])
        said[kind] = value
    return _sentences(said, rng, person.rambles)


def _sentences(said: dict[str, str], rng: random.Random, rambles: float) -> str:
    who = f"my {said['who']}" if "who" in said else words.VAGUE["who"]
    thing = f"my {said['thing']}" if "thing" in said else words.VAGUE["thing"]
    event = f"{who} {said.get('deed', words.VAGUE['deed'])} {thing}"
    cause = rng.choice(words.CAUSE_PHRASES).format(**said) if "cause" in said else ""
    wish = rng.choice(words.WISH_PHRASES).format(**said) if "wish" in said else ""
    parts = [cause, event] if rng.random() < 0.3 else [event, cause]
    if rng.random() < rambles:
        parts.insert(0, rng.choice(words.FILLERS))
    text = " ".join(part for part in parts if part) + "."
    if wish:
        text = f"{text} {wish}"
    if rng.random() < rambles:
        text = f"{text} {rng.choice(words.FILLERS)}."
    return text


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """The exact reward of each summary of each post (or TL;DR prompt), between -5 and 5; usable as a `reward_fn`.

    +1 per key fact of the post that the summary states, -1 per value it states that is not a key fact, -1 per filler, -0.25 per word
    that nobody in this world uses, -0.1 per word beyond 20, -0.5 when it does not end a sentence (or is empty).
    """
    return [_gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _gold(prompt: str, response: str) -> float:
    facts, text = read_post(prompt), _plain(response)
    stated = [(kind, value) for kind in KINDS for value in set(_pattern(words.VALUES[kind]).findall(text))]
    correct = sum(facts.get(kind) == value for kind, value in stated)
    spoken = text.split()
    reward = FACT * correct + FALSEHOOD * (len(stated) - correct) + FILLER * len(_pattern(words.FILLERS).findall(text))
    reward += STRANGE_WORD * sum(word not in _vocabulary() for word in spoken) + EXTRA_WORD * max(0, len(spoken) - ENOUGH)
    if not response.rstrip().endswith((".", "?")):
        reward += NO_END
    return max(reward, LOWEST)


def read_post(text: str) -> dict[str, str]:
    """The key facts of a post (or of a prompt that holds it) by kind; a kind that no sentence states is missing."""
    facts: dict[str, str] = {}
    plain = _plain(text)
    for pattern in _readers():
        if found := pattern.search(plain):
            facts.update(found.groupdict())
    return facts


def impressions(worth: Sequence[float], rng: random.Random) -> list[float]:
    """What a labeller thinks of summaries of these gold rewards: each plus Gumbel noise of scale 1 / CARE.

    Any two of them are then in the right order with probability sigmoid(CARE x difference), which is Bradley and Terry's model, and all of
    them in any order as in Plackett and Luce's.
    """
    return [value - math.log(-math.log(1 - rng.random() + 1e-300) + 1e-300) / CARE for value in worth]


def _plain(text: str) -> str:
    """Lower-case words with single blanks between them; everything that is no letter, digit or apostrophe is a blank."""
    return " ".join(re.sub(r"[^\w']+", " ", text.lower()).split())


@cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(re.escape(phrase.lower()) for phrase in phrases) + r")\b")


@cache
def _readers() -> tuple[re.Pattern[str], ...]:
    """One pattern for each sentence that states a key fact, with the kinds as group names."""
    values = {kind: f"(?P<{kind}>{'|'.join(map(re.escape, phrases))})" for kind, phrases in words.VALUES.items()}
    sentences = words.EVENTS + words.CAUSES + words.WISHES
    return tuple(
        re.compile(r"\b" + re.sub(r"zz(\w+?)zz", lambda m: values[m[1]], _plain(re.sub(r"\{(\w+)\}", r"zz\1zz", s))) + r"\b")
        for s in sentences
    )


@cache
def _vocabulary() -> frozenset[str]:
    """Every word that a person may use in a summary."""
    phrases = [*words.VAGUE.values(), *words.FILLERS, *words.CAUSE_PHRASES, *words.WISH_PHRASES, "my"]
    phrases += [value for values in words.VALUES.values() for value in values]
    return frozenset(" ".join(_plain(re.sub(r"\{\w+\}", "", phrase)) for phrase in phrases).split())


def write_data(directory: Path, seed: int, sizes: Mapping[str, int]) -> None:
    """Writes the jsonl files of the three stages; every file has posts of its own, and the same seed gives the same files.

    sizes: rows of sft_train, sft_valid, comparisons_train, comparisons_valid, prompts_train and prompts_valid. Posts with a summary are
    raw TL;DR rows (subreddit, title, post, summary); comparisons are prompt, responses, scores: rankings by noisy labellers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in sizes.items():
        rng = random.Random(f"{seed} {name}")
        make = ranking if name.startswith("comparisons") else raw_row
        lines = [json.dumps(make(rng), ensure_ascii=False) for _ in range(rows)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def raw_row(rng: random.Random) -> dict[str, str]:
    """A post and somebody's summary of it, in the columns of OpenAI's raw TL;DR files."""
    post = write_post(rng)
    return {"subreddit": post.subreddit, "title": post.title, "post": post.text, "summary": write_summary(post, rng)}


def ranking(rng: random.Random) -> dict[str, Any]:
    """A prompt with `RANKED` people's different summaries, often a spoilt one, and a labeller's impression of each; their order ranks them.

    Without summaries of other posts a reward model need not read the post, and without disorder not the order of words: what it never saw
    ranked it may like, and PPO finds it.
    """
    post = write_post(rng)
    prompt, summaries = prompt_of(post), list[str]()
    while len(summaries) < RANKED:
        summary = write_summary(post, rng)
        if summary not in summaries:
            summaries.append(summary)
    chance = rng.random()
    if chance < STRAY:
        summaries.append(write_summary(write_post(rng), rng))
    elif chance < STRAY + JUMBLED:
        spoken = write_summary(post, rng).split()
        summaries.append(" ".join(rng.sample(spoken, len(spoken))))
    return {"prompt": prompt, "responses": summaries, "scores": impressions(gold([prompt] * len(summaries), summaries), rng)}


def exact_pair(rng: random.Random) -> tuple[str, str, str]:
    """(prompt, better, worse): two people's summaries of a post in the order of the gold reward, never equal in it."""
    while True:
        post = write_post(rng)
        prompt, first, second = prompt_of(post), write_summary(post, rng), write_summary(post, rng)
        worth = gold([prompt, prompt], [first, second])
        if worth[0] != worth[1]:
            return (prompt, first, second) if worth[0] > worth[1] else (prompt, second, first)


def prompt_of(post: Post) -> str:
    """The post as a TL;DR prompt."""
    return format_tldr(post.subreddit, post.title, post.text)
