"""Examples to token ids: templates, truncation, EOS, filters and checks, one row of ids per prompt."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import datasets

from lit_rlhf.data.chat import render
from lit_rlhf.data.read import BadRow
from lit_rlhf.data.schemas import Example
from lit_rlhf.data.text import Post, count_words, split_post, subreddit_of, tidy_response, truncate_post

CHUNK = 256  # rows that go to the tokenizer at once


@dataclass(frozen=True)
class Settings:
    """What decides the token ids and which rows stay; the arguments of the DataModules, which say what each means."""

    max_prompt_tokens: int = 512
    max_response_tokens: int | None = None
    overlong: Literal["error", "left"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    columns: dict[str, str] | None = None
    min_words: int = 0
    drop_equal: bool = False
    subreddits: list[str] | None = None
    response_token_bounds: tuple[int, int] | None = None
    ties: Literal["half", "drop"] = "half"
    prompts_only: bool = False
    new_tokens: int = 1  # what will be generated after each prompt
    context_length: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("overlong", ("error", "left")), ("on_bad_row", ("error", "skip")), ("ties", ("half", "drop"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(allowed)}")
        if self.max_prompt_tokens < 1 or (self.max_response_tokens is not None and self.max_response_tokens < 1):
            raise ValueError("max_prompt_tokens and max_response_tokens must be at least 1")


FEATURES = datasets.Features(
    {
        "key": datasets.Value("int64"),  # hash of the prompt's text
        "prompt": datasets.Value("string"),  # exactly as tokenised
        "prompt_ids": datasets.List(datasets.Value("int32")),
        "prompt_loss": datasets.List(datasets.Value("int32")),  # positions of earlier assistant turns' tokens
        "responses": datasets.List(datasets.List(datasets.Value("int32"))),
        "pairs": datasets.List(datasets.List(datasets.Value("int32"))),
        "target": datasets.List(datasets.Value("float32")),
        "margin": datasets.List(datasets.Value("float32")),
        "reference": datasets.Value("string"),
        "columns": datasets.Value("string"),  # JSON
        "truncated": datasets.Value("bool"),
        "dropped": datasets.Value("string"),  # why the row is not used; "" for one that is
    }
)


class Encoder:
    """Texts to ids: BOS in front of prompts where the tokenizer itself would put it, EOS after responses."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so no response could end: set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        bos, own = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
        self.bos = [int(bos)] if bos is not None and own[:1] == [bos] else []
        self.start = self.bos or [int(bos) if bos is not None else self.eos]  # what generation from nothing begins with

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens of the tokenizer's own."""
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []  # type: ignore[no-any-return]

    def prompt(self, ids: list[int]) -> list[int]:
        """The ids with BOS in front, unless they begin with it."""
        return ids if ids[:1] == self.bos else self.bos + ids

    def sizes(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, BOS included."""
        return [len(self.prompt(ids)) for ids in self.ids(texts)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The (start, end) characters of each token."""
        if not self.tokenizer.is_fast:
            raise ValueError("cutting prompts on the left and several assistant turns need a fast tokenizer (one that gives offsets)")
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]  # type: ignore[no-any-return]

    def response(self, ids: list[int]) -> list[int]:
        """The ids, ended by one EOS."""
        while ids and ids[-1] == self.eos:
            ids = ids[:-1]
        return [*ids, self.eos]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything in the tokenizer that decides ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            state = json.loads(backend.to_str())
            state.pop("padding", None), state.pop("truncation", None)
        else:
            state = [type(self.tokenizer).__name__, self.tokenizer.get_vocab()]
        text = json.dumps([state, self.tokenizer.chat_template, self.eos, self.bos], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass
class Draft:
    """An example as text, on its way to ids."""

    example: Example
    prompt: str
    responses: list[str]
    spans: list[tuple[int, int]] = field(default_factory=list)
    post: Post | None = None
    dropped: str = ""


def tokenise(found: Iterable[Example | BadRow], encoder: Encoder, settings: Settings, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of `FEATURES`, dropped ones included, until `limit` rows are kept; raises the first BadRow unless bad rows are to be skipped."""
    found, kept = iter(found), 0
    while chunk := list(islice(found, CHUNK if limit is None else min(CHUNK, limit + 8))):
        for row in _chunk(chunk, encoder, settings):
            yield row
            kept += not row["dropped"]
            if kept == limit:
                return


def _chunk(chunk: list[Example | BadRow], encoder: Encoder, settings: Settings) -> Iterator[dict[str, Any]]:
    drafts = [_guard(_draft, item, encoder, settings) for item in chunk]
    live = [d for d in drafts if isinstance(d, Draft) and not d.dropped]
    prompts = iter(encoder.ids([d.prompt for d in live]))
    wanted = not settings.prompts_only or settings.response_token_bounds is not None
    responses = iter(encoder.ids([r for d in live for r in d.responses]) if wanted else [])
    for draft in drafts:
        if isinstance(draft, str) or draft.dropped:
            yield _dropped(draft if isinstance(draft, str) else draft.dropped)
            continue
        prompt, answers = next(prompts), [next(responses) for _ in draft.responses] if wanted else []
        row = _guard(_row, draft, prompt, answers, encoder, settings)
        yield _dropped(row) if isinstance(row, str) else row


def _guard(step: Any, *args: Any) -> Any:
    """The step's result; for a bad row its reason, or its error with the remedy."""
    settings: Settings = args[-1]
    try:
        if isinstance(args[0], BadRow):
            raise args[0]
        return step(*args)
    except BadRow as bad:
        if settings.on_bad_row == "skip":
            return bad.reason
        bad.args = (f"{bad}; mend the row, or leave such rows out with on_bad_row: skip",)
        raise


def _dropped(reason: str) -> dict[str, Any]:
    empty: dict[str, Any] = {name: [] for name in ("prompt_ids", "prompt_loss", "responses", "pairs", "target", "margin")}
    return empty | {"key": 0, "prompt": "", "reference": None, "columns": "{}", "truncated": False, "dropped": reason}


def _draft(example: Example, encoder: Encoder, settings: Settings) -> Draft:
    """Renders messages, gives TL;DR texts their one form, and applies the filters that need only text."""
    prompt, responses, spans = render(encoder.tokenizer, example.prompt, example.responses, example.where)
    post = split_post(prompt) if isinstance(example.prompt, str) else None
    if post is not None:
        prompt = post.text
    if isinstance(example.prompt, str) and prompt.rstrip().endswith("TL;DR:"):
        prompt = prompt if post is not None else prompt.rstrip()
        responses = [tidy_response(r) for r in responses]
        example.reference = tidy_response(example.reference).strip() if example.reference else example.reference
    draft = Draft(example, prompt, responses, spans, post)
    draft.dropped = _filtered(draft, settings)
    return draft


def _filtered(draft: Draft, settings: Settings) -> str:
    """Why a filter drops the row, or ""."""
    texts = [r.strip() for r in draft.responses]
    if settings.drop_equal and len(texts) > 1 and len(set(texts)) == 1:
        return "equal responses"
    if settings.min_words and any(count_words(text) < settings.min_words for text in texts):
        return f"fewer than {settings.min_words} words"
    if settings.subreddits is not None:
        name = draft.example.columns.get("subreddit") or subreddit_of(draft.prompt) or ""
        if str(name).removeprefix("r/").lower() not in {s.removeprefix("r/").lower() for s in settings.subreddits}:
            return "other subreddit"
    return ""


def _row(draft: Draft, prompt_ids: list[int], answers: list[list[int]], encoder: Encoder, settings: Settings) -> dict[str, Any]:
    """Cuts the prompt, ends the responses, checks lengths; a row of `FEATURES`."""
    example, where = draft.example, draft.example.where
    bounds, most = settings.response_token_bounds, settings.max_response_tokens
    if bounds is not None and any(not bounds[0] <= len(ids) <= bounds[1] for ids in answers):
        return _dropped(f"response not of {bounds[0]} to {bounds[1]} tokens")
    answers = [] if settings.prompts_only else [encoder.response(ids) for ids in answers]
    for ids in answers:
        if encoder.eos in ids[:-1]:
            raise BadRow("end token inside", where, f"a response holds the end token {encoder.tokenizer.eos_token} before its end")
    if most is not None and any(len(ids) > most for ids in answers):
        return _dropped(f"response of more than {most} tokens")
    prompt, ids = _fit(draft, encoder.prompt(prompt_ids), encoder, settings)
    total, context = len(ids) + max(map(len, answers), default=settings.new_tokens), settings.context_length
    if context is not None and total > context:
        what = f"prompt and response have {len(ids)} + {total - len(ids)} tokens"
        new = "max_response_tokens" if answers else "the number of new tokens"
        raise BadRow("beyond context", where, f"{what}, and the model's context is {context}: lower max_prompt_tokens, or {new}")
    pairs, target, margin = _pairs(draft, settings)
    if example.pairs and not pairs:
        return _dropped("equal responses or scores")
    columns = _plain_json({**example.columns, "prompt": prompt}, where)
    return {
        "key": int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little", signed=True),
        "prompt": prompt,
        "prompt_ids": ids,
        "prompt_loss": _turns(draft, prompt, ids, encoder),
        "responses": answers,
        "pairs": [list(pair) for pair in pairs],
        "target": target,
        "margin": margin,
        "reference": example.reference,
        "columns": columns,
        "truncated": prompt != draft.prompt,
        "dropped": "",
    }


def _plain_json(columns: dict[str, Any], where: str) -> str:
    """The row's columns as JSON, which reward functions and metrics by group get back; a BadRow where one cannot be kept so."""
    try:
        return json.dumps(columns, default=str)
    except (RecursionError, TypeError, ValueError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadRow("not plain data", where, f"its columns cannot be kept as JSON ({what}): leave out the one that is so") from None


def _fit(draft: Draft, ids: list[int], encoder: Encoder, settings: Settings) -> tuple[str, list[int]]:
    """The prompt's text and ids, cut to max_prompt_tokens where there is a rule for it."""
    most, where = settings.max_prompt_tokens, draft.example.where
    if not ids:
        raise BadRow("empty field", where, "the prompt has no tokens")
    if len(ids) <= most:
        return draft.prompt, ids
    if draft.post is not None:
        post = truncate_post(draft.post, encoder.sizes, most)
        if post is None:
            raise BadRow(
                "overlong prompt", where, f"the prompt has {len(ids)} tokens and more than max_prompt_tokens {most} even with an empty post"
            )
        return post.text, encoder.prompt(encoder.ids([post.text])[0])
    if settings.overlong == "error":
        raise BadRow(
            "overlong prompt",
            where,
            f"the prompt has {len(ids)} tokens, more than max_prompt_tokens {most}, and is no TL;DR post that could be cut at a paragraph: "
            "raise max_prompt_tokens, or keep only its end with overlong: left",
        )
    starts = [start for start, _ in encoder.offsets(draft.prompt)]
    for start in starts[len(starts) - (most - len(encoder.bos)) :]:
        text = draft.prompt[start:]
        cut = encoder.prompt(encoder.ids([text])[0])
        if 0 < len(cut) <= most:
            return text, cut
    raise BadRow("overlong prompt", where, f"the prompt cannot be cut to max_prompt_tokens {most}")


def _turns(draft: Draft, prompt: str, ids: list[int], encoder: Encoder) -> list[int]:
    """Positions in the prompt of the tokens that earlier assistant turns are made of; never position 0."""
    if not draft.spans:
        return []
    offsets, shift = encoder.offsets(prompt), len(draft.prompt) - len(prompt)
    first = len(ids) - len(offsets)
    inside = (i for i, (a, b) in enumerate(offsets, first) if b > a and any(s <= a + shift and b + shift <= e for s, e in draft.spans))
    return [i for i in inside if i > 0]


def _pairs(draft: Draft, settings: Settings) -> tuple[list[tuple[int, int]], list[float], list[float]]:
    """The pairs that stay, with targets and margins (empty lists where no pair has one)."""
    example, texts = draft.example, [r.strip() for r in draft.responses]
    target, margin = example.target or [], example.margin or []
    keep = [
        q
        for q, (i, j) in enumerate(example.pairs)
        if not (settings.drop_equal and texts[i] == texts[j]) and not (settings.ties == "drop" and target and target[q] == 0.5)
    ]
    target = [target[q] for q in keep] if target else []
    return [example.pairs[q] for q in keep], target, [margin[q] for q in keep] if margin else []
