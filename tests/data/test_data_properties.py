"""What must hold for every row: prompts never exceed their limit, and columns decide the schema as documented."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_rlhf.data.read import BadRow
from lit_rlhf.data.schemas import PAIR_SCHEMAS, PROMPT_SCHEMAS, SFT_SCHEMAS, Example, examples
from lit_rlhf.data.text import format_tldr, split_post, truncate_post
from lit_rlhf.data.tokenise import Encoder, Settings, tokenise

steady = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text("ab \n猫é<", max_size=80)
PIECES = st.lists(st.sampled_from(["cat", " that", "\n", "\n\n", "mat ", "猫", "zz", " "]), max_size=25).map("".join)


def shorter(post: str) -> str | None:
    """OpenAI's step (tasks.py, process_query): drop the last newline and what follows, without a newline one character."""
    return post[: post.rfind("\n")] if "\n" in post else post[:-1] if post else None


@given(PIECES, st.integers(1, 140), st.sampled_from([1, 2, 3]))
@steady
def test_truncation_takes_the_documented_steps_until_it_fits(post, most, size):
    """For a count that grows with the text (here characters, pairs or triples of them)."""

    def count(texts):
        return [-(-len(text) // size) for text in texts]

    whole = split_post(format_tldr("cats", "Help", post))
    expected: str | None = whole.post
    while expected is not None and count([whole._replace(post=expected).text])[0] > most:
        expected = shorter(expected)
    cut = truncate_post(whole, count, most)
    assert (cut and cut.post) == expected
    if cut is not None:
        assert cut.head == whole.head and cut.tail == whole.tail and whole.post.startswith(cut.post) and count([cut.text])[0] <= most


@given(TEXT.filter(str.strip), st.integers(1, 40) | st.integers(1, 5), st.sampled_from(["error", "left"]), st.booleans(), st.booleans())
@settings(steady, max_examples=300)
def test_no_prompt_is_longer_than_its_limit(bpe, chars_bos, text, most, overlong, tldr, bos):
    """Neither with a byte-level BPE nor with a BOS in front; a plain prompt keeps its end, and is refused only where it was too long."""
    encoder = Encoder(chars_bos if bos else bpe)
    prompt = format_tldr("c", "t", text) if tldr else text
    rows = tokenise([Example("x:1", prompt, ["yes"])], encoder, Settings(max_prompt_tokens=most, overlong=overlong))
    size = len(encoder.prompt(encoder.ids([split_post(prompt).text if tldr else prompt])[0]))
    try:
        (row,) = rows
    except BadRow as bad:
        assert bad.reason == "overlong prompt" and size > most
        return
    assert 0 < len(row["prompt_ids"]) <= most
    assert row["prompt_ids"] == encoder.prompt(encoder.ids([row["prompt"]])[0])  # the ids are those of the text that is kept
    if tldr:
        assert row["prompt"].startswith("SUBREDDIT: r/c\n\nTITLE: t\n\nPOST: ") and row["prompt"].endswith("TL;DR:")
    else:
        assert prompt.endswith(row["prompt"]) and (size > most) == row["truncated"]


# Schemas: each column holds a value of its own, so that what comes out tells what was read.

SHARED = "Human: Hi\n\nAssistant:"
VALUES = {
    "prompt": "the prompt",
    "label": "a label",
    "completion": "a completion",
    "summary": "a summary",
    "response": "a response",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a message"}],
    "subreddit": "cats",
    "title": "Help",
    "post": "It ate.",
    "chosen": SHARED + " good",
    "rejected": SHARED + " bad",
    "responses": ["one", "two"],
    "scores": [2, 1],
    "info": {"subreddit": "dogs", "title": "Hey", "post": "It ran."},
    "summaries": [{"text": "first"}, {"text": "second"}],
    "choice": 1,
    "noise": 3,
    "id": "t3",
}
COLUMNS = st.sets(st.sampled_from(sorted(VALUES)), min_size=1, max_size=7)
LABELS = ("label", "completion", "summary", "response")
POST = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: It ate.\n\nTL;DR:"
OTHER_POST = "SUBREDDIT: r/dogs\n\nTITLE: Hey\n\nPOST: It ran.\n\nTL;DR:"
HI = [{"role": "user", "content": "Hi"}]


def as_sft(has: set[str]):
    """The documented order: prompt + label, messages, raw TL;DR."""
    label = next((VALUES[name] for name in LABELS if name in has), None)
    if "prompt" in has and label:
        return "the prompt", [label]
    if "messages" in has:
        return HI, [[{"role": "assistant", "content": "a message"}]]
    if {"subreddit", "title", "post", "summary"} <= has:
        return POST, [" a summary"]
    return None


def as_pair(has: set[str]):
    """The documented order: raw comparisons, ratings, prompt + pair, pairs that share their beginning."""
    if {"info", "summaries", "choice"} <= has:
        return OTHER_POST, [" second", " first"]
    if {"prompt", "responses", "scores"} <= has:
        return "the prompt", ["one", "two"]
    if {"prompt", "chosen", "rejected"} <= has:
        return "the prompt", [SHARED + " good", SHARED + " bad"]
    if {"chosen", "rejected"} <= has:
        return SHARED, [" good", " bad"]
    return None


def as_prompt(has: set[str]):
    """Pairs, then labelled prompts, messages, raw posts, bare prompts."""
    if found := as_pair(has) or as_sft(has - {"messages", "subreddit"}):
        return found
    if "messages" in has:
        return HI, [[{"role": "assistant", "content": "a message"}]]
    if {"subreddit", "title", "post"} <= has:
        return POST, [" a summary"] if "summary" in has else []
    return ("the prompt", []) if "prompt" in has else None


@pytest.mark.parametrize(("schemas", "expected"), [(SFT_SCHEMAS, as_sft), (PAIR_SCHEMAS, as_pair), (PROMPT_SCHEMAS, as_prompt)])
@given(COLUMNS, st.booleans(), st.randoms())
@settings(steady, max_examples=150)
def test_columns_decide_the_schema(schemas, expected, has, renamed, random):
    """In whatever order they stand, and under whatever names `columns` gives them; what fits no schema is an error that says so."""
    order = sorted(has)
    random.shuffle(order)
    name = (lambda column: f"my {column}") if renamed else (lambda column: column)
    row = {name(column): VALUES[column] for column in order}
    columns = {column: name(column) for column in order} if renamed else {}
    wanted = expected(has)
    if wanted is None:
        with pytest.raises(ValueError, match="^x:1: ") as error:
            list(examples([("x:1", row)], "x", schemas, columns))
        message = str(error.value)
        assert all(name(column) in message for column in order) and "Accepted: " in message and "`columns`" in message
        return
    (found,) = examples([("x:1", row)], "x", schemas, columns)
    assert not isinstance(found, BadRow) and (found.prompt, found.responses) == wanted
    assert found.columns.items() >= row.items()  # nothing of the row is lost


def test_every_known_set_of_columns_is_found_alone():
    """No schema stands in the way of another: each set of columns by itself is read as itself."""
    sets = {as_sft: [{"prompt", label} for label in LABELS] + [{"messages"}, {"subreddit", "title", "post", "summary"}]}
    sets[as_pair] = [{"info", "summaries", "choice"}, {"prompt", "responses", "scores"}]
    sets[as_pair] += [{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}]
    sets[as_prompt] = [*sets[as_pair], *sets[as_sft], {"prompt"}, {"subreddit", "title", "post"}]
    for (expected, known), schemas in zip(sets.items(), (SFT_SCHEMAS, PAIR_SCHEMAS, PROMPT_SCHEMAS), strict=True):
        for has in known:
            (found,) = examples([("x:1", {column: VALUES[column] for column in has})], "x", schemas)
            assert (found.prompt, found.responses) == expected(has)
        assert all(expected(a) is not None for a in known)
    assert len(list(itertools.chain(*sets.values()))) == 6 + 4 + 12
