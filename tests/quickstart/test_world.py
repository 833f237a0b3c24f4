"""The made-up forum: what it writes, and what the gold reward says of it."""

import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.data.text import format_tldr
from lit_rlhf.quickstart import words
from lit_rlhf.quickstart.world import CARE, exact_pair, gold, impressions, ranking, read_post, write_data, write_post, write_summary
from lit_rlhf.scoring import FunctionScorer

POST = "My uncle sold my bike. Others would leave at once. It happened during the storm. Nobody touched the guitar. Now I want to move out."
FACTS = {"who": "uncle", "deed": "sold", "thing": "bike", "cause": "storm", "wish": "move out"}

# gold = facts right - wrong - fillers - 0.25 x strange words - 0.1 x words beyond 20 - 0.5 where the end is missing
WORKED = [
    ("my uncle sold my bike after the storm. should I move out?", 5.0),
    (" My uncle sold my bike after the storm. should I MOVE OUT?", 5.0),  # case and leading blank do not matter
    ("my uncle sold my bike after the storm. should I move out", 4.5),  # no end: - 0.5
    ("my uncle sold my stuff.", 2.0),
    ("my uncle sold my guitar.", 1.0),  # 2 - 1 wrong
    ("my uncle uncle uncle sold my bike.", 3.0),  # a fact counts once
    ("basically my uncle sold my bike. thanks for reading.", 1.0),  # 3 - 2 fillers
    ("my uncle sold my banana.", 1.75),  # 2 - 1 strange word x 0.25
    ("my " * 20 + "uncle sold the bike.", 2.6),  # 3 - 4 words too many x 0.1
    ("", -0.50),  # no end
    ("?", 0.00),  # no word, but an end
]


@pytest.mark.parametrize(("summary", "worth"), WORKED)
def test_gold_by_hand(summary, worth):
    assert gold([POST], [summary])[0] == pytest.approx(worth)


def test_gold_reads_the_whole_prompt_and_is_a_reward_fn():
    prompt = format_tldr("advice", "Help me decide", POST)
    scores = FunctionScorer(gold)([prompt, prompt], [WORKED[0][0], WORKED[3][0]], {"reference": ["x", "y"]})
    assert scores.tolist() == pytest.approx([5.0, 2.0])


@given(st.text(max_size=400), st.text(max_size=400))
@settings(max_examples=40, deadline=None)
def test_gold_of_any_two_texts(post, summary):
    (worth,) = gold([post], [summary])
    assert math.isfinite(worth) and -5 <= worth <= 5


def test_gold_of_nonsense_is_low():
    listing = " ".join(value for values in words.VALUES.values() for value in values)
    for text in ("asdf qwer " * 20, POST + POST, listing, "\x00\x1f￿", "." * 1000):
        assert gold([POST], [text])[0] <= 0.5  # a short true summary is worth 2
    assert gold(["a post from another world"], ["my uncle sold my bike."])[0] == pytest.approx(-3)  # nothing it states is true


def test_posts_are_read_back_exactly():
    rng = random.Random(0)
    for _ in range(500):
        post = write_post(rng)
        assert read_post(format_tldr(post.subreddit, post.title, post.text)) == post.facts
        assert all(value != post.facts[kind] for kind, value in post.others.items())
    assert read_post(POST) == FACTS


def test_no_value_hides_in_another_text():
    values = [value for values in words.VALUES.values() for value in values]
    assert len(set(values)) == len(values)
    rest = [*words.FILLERS, *words.VAGUE.values(), *words.CAUSE_PHRASES, *words.WISH_PHRASES]
    for value in values:
        for other in [v for v in values if v != value] + rest:
            assert f" {value} " not in f" {other.lower()} "


def test_people_leave_room_for_a_policy():
    rng = random.Random(1)
    posts = [write_post(rng) for _ in range(1000)]
    worth = gold([post.text for post in posts], [write_summary(post, rng) for post in posts])
    assert 2.5 < sum(worth) / len(worth) < 3.7
    assert max(worth) == 5


@pytest.mark.parametrize(("difference", "expected"), [(0.0, 0.5), (0.4, 0.7311), (0.8, 0.8808), (-0.8, 0.1192)])
def test_labellers_noise_is_bradley_terry(difference, expected):
    assert CARE == 2.5  # the expected shares are sigmoid(2.5 x difference) = sigmoid(1), sigmoid(2), sigmoid(-2)
    rng, n = random.Random(2), 4000
    pairs = [impressions([1.3 + difference, 1.3], rng) for _ in range(n)]
    share = sum(first > second for first, second in pairs) / n
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_exact_pairs_are_in_the_gold_order():
    rng = random.Random(3)
    for prompt, better, worse in (exact_pair(rng) for _ in range(100)):
        first, second = gold([prompt] * 2, [better, worse])
        assert first > second


def test_rankings_are_noisy():
    rng, wrong, pairs = random.Random(4), 0, 0
    for row in (ranking(rng) for _ in range(150)):
        assert len(set(row["responses"][:4])) == 4 and len(row["scores"]) == len(row["responses"]) <= 5
        worth = gold([row["prompt"]] * 4, row["responses"][:4])
        for i, j in itertools.combinations(range(4), 2):
            if worth[i] != worth[j]:
                pairs += 1
                wrong += (worth[i] > worth[j]) != (row["scores"][i] > row["scores"][j])
    assert 0.03 < wrong / pairs < 0.12


def test_the_fifth_summary_is_of_another_post_or_in_disorder():
    """One of another post states facts that are not the post's, in sentences; of people's own summaries hardly one states two of them."""
    rng, strays, jumbled, rows = random.Random(5), 0, 0, 1000
    for row in (ranking(rng) for _ in range(rows)):
        facts, fifth = read_post(row["prompt"]), "".join(row["responses"][4:])
        stated = {kind: value for kind, values in words.VALUES.items() for value in values if f" {value} " in f" {fifth.strip('.?')} "}
        wrong = sum(facts[kind] != value for kind, value in stated.items())
        ends = fifth.endswith((".", "?"))
        strays, jumbled = strays + (ends and wrong >= 2), jumbled + (bool(fifth) and not ends)
    assert 0.22 < strays / rows < 0.32  # 0.3, less those that state fewer than two facts
    assert 0.06 < jumbled / rows < 0.12  # 0.1, less those that end in their full stop by chance


def test_the_same_seed_writes_the_same_files(tmp_path):
    sizes = {"sft_train": 20, "comparisons_train": 20, "prompts_valid": 5, "held_out": 20}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_data(tmp_path / name, seed, sizes)
    for name, rows in sizes.items():
        first, again, other = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in "abc")
        assert first == again != other
        assert len([json.loads(line) for line in first.splitlines()]) == rows
    train, held_out = ((tmp_path / "a" / f"{name}.jsonl").read_text().splitlines() for name in ("sft_train", "held_out"))
    assert not set(train) & set(held_out)
    assert list(json.loads(train[0])) == ["subreddit", "title", "post", "summary"]
    assert list(json.loads((tmp_path / "a" / "comparisons_train.jsonl").read_text().splitlines()[0])) == ["prompt", "responses", "scores"]
