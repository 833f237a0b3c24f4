"""The TL;DR text format: building it, recognising it, cutting it at paragraphs, and counting words."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

# OpenAI's format has blank lines between the parts, CarperAI's data sets have single newlines and, in the comparisons, no "TL;DR:".
_TLDR = re.compile(r"\s*SUBREDDIT: (?P<subreddit>[^\n]*)(?P<gap>\n{1,2})TITLE: (?P<title>.*?)(?P=gap)POST: ?", re.DOTALL)
_ARTICLE = re.compile(r"\s*Article:\n(?P<post>.*)\n\nTL;DR:\n?\s*", re.DOTALL)
# Scripts that write no spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han. Each character counts as a word.
_SPACELESS = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
WINDOW = 32  # longer candidates looked at beyond the one that bisection found


class Post(NamedTuple):
    """A prompt in three parts, head + post + tail; only the post may be cut."""

    head: str
    post: str
    tail: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.head + self.post + self.tail


def format_tldr(subreddit: str, title: str, post: str) -> str:
    """The query text of OpenAI's TL;DR task, without a trailing space (summarize-from-feedback, experiment_helpers.py)."""
    return f"SUBREDDIT: r/{subreddit.removeprefix('r/')}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def format_article(article: str) -> str:
    """The query text of OpenAI's CNN/DM task."""
    return f"Article:\n{article}\n\nTL;DR:\n"


def split_post(prompt: str) -> Post | None:
    """The parts of a prompt in TL;DR (or CNN/DM) format, with "TL;DR:" added where it is missing; None for any other text."""
    if found := _TLDR.match(prompt):
        body = prompt[found.end() :].rstrip()  # by hand: a pattern for the end takes a minute over a post with 100,000 spaces
        before = body.removesuffix("TL;DR:")
        post = before.rstrip()
        tail = before[len(post) :] if before != body and "\n" in before[len(post) :] else found["gap"]
        return Post(prompt[found.start("subreddit") - len("SUBREDDIT: ") : found.end()], post, tail + "TL;DR:")
    if found := _ARTICLE.fullmatch(prompt):
        return Post("Article:\n", found["post"], "\n\nTL;DR:\n")
    return None


def subreddit_of(prompt: str) -> str | None:
    """The subreddit's name without "r/", or None where the prompt is no TL;DR post."""
    found = _TLDR.match(prompt)
    return found["subreddit"].strip().removeprefix("r/") if found else None


def tidy_response(text: str) -> str:
    """A response to a "TL;DR:" prompt: no label of its own, exactly one leading space."""
    return " " + text.strip().removeprefix("TL;DR:").strip()


def cut_points(post: str) -> list[int]:
    """Lengths of the post that OpenAI's rule tries, longest first: up to each newline from the last, then character by character."""
    ends = [found.start() for found in re.finditer("\n", post)]
    first = ends[0] if ends else len(post)
    return [len(post), *reversed(ends), *range(first - 1, -1, -1)]


def truncate_post(prompt: Post, count: Callable[[Sequence[str]], list[int]], max_tokens: int) -> Post | None:
    """The longest cut of the post with which the prompt has at most `max_tokens` tokens, or None where even an empty post has more.

    `count` gives the number of tokens of each text. The rule is OpenAI's (tasks.py, process_query): drop what follows the last newline, and
    without a newline drop one character, until it fits. The first fit is found by bisection, since the number of tokens falls with the
    length but for the few tokens at the cut; the next longer `WINDOW` candidates are then tried too, so that the result is OpenAI's.
    """
    if count([prompt.text])[0] <= max_tokens:
        return prompt
    ends = cut_points(prompt.post)

    def cut(index: int) -> Post:
        return prompt._replace(post=prompt.post[: ends[index]])

    low, high = 1, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if count([cut(middle).text])[0] <= max_tokens:
            high = middle
        else:
            low = middle + 1
    window = range(max(1, low - WINDOW), min(low + WINDOW, len(ends)))
    if not window:
        return None
    sizes = count([cut(index).text for index in window])
    return next((cut(index) for index, size in zip(window, sizes, strict=True) if size <= max_tokens), None)


def count_words(text: str) -> int:
    """Words between spaces; in scripts without spaces every character is one."""
    return len(_SPACELESS.findall(text)) + len(_SPACELESS.sub(" ", text).split())
