import random
import time

import pytest

from lit_rlhf.data.text import (
    Post,
    count_words,
    cut_points,
    format_article,
    format_tldr,
    split_post,
    subreddit_of,
    tidy_response,
    truncate_post,
)

OPENAI = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: One.\nTwo.\n\nThree.\n\nTL;DR:"


def test_format_is_openais():
    assert format_tldr("cats", "Help", "One.\nTwo.\n\nThree.") == OPENAI
    assert format_tldr("r/cats", "Help", "One.\nTwo.\n\nThree.") == OPENAI
    assert format_article("News.") == "Article:\nNews.\n\nTL;DR:\n"


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        (OPENAI, Post("SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: ", "One.\nTwo.\n\nThree.", "\n\nTL;DR:")),
        ("SUBREDDIT: r/a\nTITLE: b\nPOST: c\nd\nTL;DR:", Post("SUBREDDIT: r/a\nTITLE: b\nPOST: ", "c\nd", "\nTL;DR:")),  # CarperAI's
        ("SUBREDDIT: r/a\nTITLE: b\nPOST: c\nd", Post("SUBREDDIT: r/a\nTITLE: b\nPOST: ", "c\nd", "\nTL;DR:")),  # its comparisons
        ("SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: c\n\nTL;DR: \n", Post("SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: ", "c", "\n\nTL;DR:")),
        (  # a TL;DR inside the post is part of the post
            "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: TL;DR: me\n\nTL;DR:",
            Post("SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: ", "TL;DR: me", "\n\nTL;DR:"),
        ),
        (format_article("x\ny"), Post("Article:\n", "x\ny", "\n\nTL;DR:\n")),
        ("What is 2 + 2?", None),
        ("TL;DR:", None),
    ],
)
def test_split_post(prompt, parts):
    assert split_post(prompt) == parts


def test_a_post_with_many_spaces_is_fast():
    started = time.perf_counter()
    for space in " \n":
        prompt = "SUBREDDIT: r/a\nTITLE: b\nPOST: c" + space * 200_000 + "d"
        assert split_post(prompt).post == "c" + space * 200_000 + "d" and subreddit_of(prompt) == "a"
    assert time.perf_counter() - started < 2


def test_subreddit_and_response():
    assert subreddit_of(OPENAI) == "cats"
    assert subreddit_of("hello") is None
    assert tidy_response("TL;DR:  my cat ") == " my cat"
    assert tidy_response(" my cat") == " my cat"
    assert tidy_response("my cat") == " my cat"


def test_words():
    assert count_words("my cat  eats\nme") == 4
    assert count_words("我的猫吃我") == 5  # no spaces: characters
    assert count_words("猫 eats me") == 3


def test_cut_points_by_hand():
    # "ab\n\nc": whole (5), before the second newline (3: "ab\n"), before the first (2), then "a" (1), "" (0)
    assert cut_points("ab\n\nc") == [5, 3, 2, 1, 0]
    assert cut_points("ab") == [2, 1, 0]
    assert cut_points("") == [0]


def characters(texts):
    return [len(text) for text in texts]


@pytest.mark.parametrize(
    ("most", "post"),
    [
        (100, "One.\nTwo.\n\nThree."),
        (63, "One.\nTwo.\n\nThree."),  # 38 + 17 + 8 = 63 characters: just fits
        (62, "One.\nTwo.\n"),  # a blank line costs two steps; after the first, 38 + 10 + 8 = 56
        (55, "One.\nTwo."),
        (54, "One."),  # 50
        (49, "One"),  # no newline left: one character
        (48, "On"),
        (46, ""),
    ],
)
def test_truncation_by_hand(most, post):
    head, _, tail = split_post(OPENAI)
    assert (len(head), len(tail)) == (38, 8)
    assert truncate_post(split_post(OPENAI), characters, most) == Post(head, post, tail)


def test_truncation_gives_up():
    assert truncate_post(split_post(OPENAI), characters, 45) is None


def one_by_one(prompt, count, most):
    """OpenAI's process_query, as written there."""
    post = prompt.post
    while count([prompt._replace(post=post).text])[0] > most:
        if not post:
            return None
        i = post.rfind("\n")
        post = post[:i] if i >= 0 else post[:-1]
    return prompt._replace(post=post)


def test_truncation_is_that_of_trying_one_by_one(bpe):
    def count(texts):
        return [len(ids) for ids in bpe(list(texts), add_special_tokens=False)["input_ids"]]

    draw = random.Random(0)
    for _ in range(150):
        words = [draw.choice(["cat", "that", "mat ", "hat", "zebra", "\n", "\n\n", "猫", "t", "ate"]) for _ in range(draw.randrange(60))]
        post = split_post(format_tldr("cats", "my cat", " ".join(words) if draw.random() < 0.5 else "".join(words).replace("\n", "")))
        most = draw.randrange(20, 80)
        assert truncate_post(post, count, most) == one_by_one(post, count, most)


def test_truncation_of_one_long_paragraph_is_fast(bpe):
    calls = []

    def count(texts):
        calls.extend(texts)
        return [len(ids) for ids in bpe(list(texts), add_special_tokens=False)["input_ids"]]

    started = time.perf_counter()
    cut = truncate_post(split_post(format_tldr("cats", "t", "zebra " * 20_000)), count, 512)
    assert count([cut.text]) == [512]
    assert len(calls) < 100
    assert time.perf_counter() - started < 5
