"""Recognises a data set by its columns and turns each of its rows into an Example."""

import difflib
import math
import os.path
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations, islice
from typing import Any

from lit_rlhf.data.read import BadRow, Row, _short, names_of
from lit_rlhf.data.text import format_article, format_tldr

Message = dict[str, Any]
Text = str | list[Message]  # a plain text, or chat messages
LARGEST = 3.4e38  # of a float32, in which numbers are kept


@dataclass
class Example:
    """One prompt with its responses, as texts (or messages) before any template, truncation or tokenizer."""

    where: str
    prompt: Text
    responses: list[Text] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    """Preferred and other, as positions in `responses`."""
    target: list[float] | None = None
    margin: list[float] | None = None
    reference: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


class Fields:
    """One row's fields under our names, with the checks that make its errors readable."""

    def __init__(self, row: Mapping[str, Any], where: str, renamed: Mapping[str, str]) -> None:
        self.row, self.where, self.renamed = row, where, renamed

    def __contains__(self, name: str) -> bool:
        return self.row.get(self.renamed.get(name, name)) is not None

    def bad(self, reason: str, what: str) -> BadRow:
        """The error for this row."""
        return BadRow(reason, self.where, what)

    def value(self, name: str) -> Any:
        """The raw value; a BadRow where the row has no such field."""
        name = self.renamed.get(name, name)
        if name not in self.row:
            raise self.bad("missing field", f'no field "{name}" (has: {names_of(self.row)})')
        return self.row[name]

    def text(self, name: str) -> str:
        """A text with at least one character that is no space."""
        return self.check_text(self.value(name), f'field "{self.renamed.get(name, name)}"')

    def check_text(self, value: Any, what: str) -> str:
        """The value if it is a non-empty text that can be encoded; `what` names it in the error."""
        if not isinstance(value, str):
            raise self.bad("not text", f"{what} is {_short(value)}, not a text")
        if not value.strip():
            raise self.bad("empty field", f"{what} is empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise self.bad(
                "lone surrogate", f"{what} holds half of a surrogate pair ({code}) at character {error.start + 1}: not valid text"
            ) from None
        return value

    def number(self, name: str) -> float | None:
        """A finite number, or None where the field is missing or null."""
        if name not in self:
            return None
        return self.check_number(self.value(name), f'field "{self.renamed.get(name, name)}"')

    def check_number(self, value: Any, what: str) -> float:
        """The value as a finite number (csv files hold numbers as texts)."""
        try:
            number = math.nan if isinstance(value, bool) or value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST:
            raise self.bad("not a number", f"{what} is {_short(value)}, not a finite number")
        return number

    def messages(self, name: str) -> list[Message]:
        """Chat messages: objects with a role and a text as content."""
        return self.check_messages(self.value(name), f'field "{self.renamed.get(name, name)}"')

    def check_messages(self, value: Any, what: str) -> list[Message]:
        """The value if it is a non-empty list of messages."""
        if not isinstance(value, list) or not value:
            raise self.bad("not messages", f"{what} is {_short(value)}, not a list of messages")
        for i, message in enumerate(value):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise self.bad("not messages", f'{what}[{i}] is {_short(message)}, not a message with "role" and "content"')
            self.check_text(message.get("content"), f"{what}[{i}].content")
        return value

    def text_or_messages(self, name: str) -> Text:
        """A text, or messages."""
        return self.messages(name) if isinstance(self.value(name), list) else self.text(name)

    def example(self, prompt: Text, responses: Iterable[Text] = (), **rest: Any) -> Example:
        """An Example that keeps all of this row's columns."""
        columns = {**self.row, **rest.pop("columns", {})}
        return Example(self.where, prompt, list(responses), columns=columns, **rest)


def plain(text: Text) -> str:
    """What a reader would call the response: the text, or the last message's content."""
    return (text if isinstance(text, str) else str(text[-1]["content"])).strip()


def _prompt_label(row: Fields) -> Example:
    name = next(
        (name for name in LABELS if name in row), next((name for name in LABELS if row.renamed.get(name, name) in row.row), LABELS[0])
    )
    prompt, response = row.text_or_messages("prompt"), row.text_or_messages(name)
    if isinstance(response, list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return row.example(prompt, [response], reference=plain(response))


def _prompt(row: Fields) -> Example:
    return row.example(row.text_or_messages("prompt"))


def _messages(row: Fields) -> Example:
    messages = row.messages("messages")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise row.bad("no answer", 'field "messages" does not end in an assistant message that answers another one')
    return row.example(messages[:-1], [messages[-1:]], reference=plain(messages))


def _messages_prompt(row: Fields) -> Example:
    """Prompts alone: the messages may end in a question."""
    messages = row.messages("messages")
    return row.example(messages) if messages[-1]["role"] != "assistant" or len(messages) < 2 else _messages(row)


def _tldr(row: Fields) -> Example:
    summary = " " + row.text("summary").strip()
    return row.example(format_tldr(row.text("subreddit"), row.text("title"), row.text("post")), [summary], reference=summary.strip())


def _tldr_prompt(row: Fields) -> Example:
    return _tldr(row) if "summary" in row else row.example(format_tldr(row.text("subreddit"), row.text("title"), row.text("post")))


def _soft(row: Fields) -> dict[str, Any]:
    """The optional columns of a pair: margin, and target, the probability that chosen is the better one."""
    margin, target = row.number("margin"), row.number("target")
    if target is not None and not 0 <= target <= 1:
        raise row.bad("not a probability", f'field "target" is {target:g}, not between 0 and 1')
    return {"margin": None if margin is None else [margin], "target": None if target is None else [target]}


def _pair(row: Fields) -> Example:
    """prompt + chosen + rejected; any of them may be messages (a prompt text beside whole conversations is then left aside)."""
    chosen, rejected = row.text_or_messages("chosen"), row.text_or_messages("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise row.bad("not messages", "chosen and rejected must both be texts or both be messages")
    if isinstance(chosen, list):
        if len(chosen) > 1:
            return _shared(row)
        prompt = row.text_or_messages("prompt")
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    else:
        prompt = row.text_or_messages("prompt")
    return row.example(prompt, [chosen, rejected], pairs=[(0, 1)], reference=plain(chosen), **_soft(row))


def _shared(row: Fields) -> Example:
    """chosen + rejected that share their beginning (HH-RLHF): split at the last "Assistant:" or before the last message."""
    chosen, rejected = row.text_or_messages("chosen"), row.text_or_messages("rejected")
    prompt: Text
    responses: list[Text]
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, responses = chosen[:-1], [chosen[-1:], rejected[-1:]]
        if not prompt or prompt != rejected[:-1]:
            raise row.bad("no shared prompt", "chosen and rejected do not share all messages but the last")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        common = os.path.commonprefix([chosen, rejected])
        end = common.rfind("Assistant:") + len("Assistant:")
        if end < len("Assistant:"):
            raise row.bad("no shared prompt", "chosen and rejected share no beginning that ends in 'Assistant:'; add a prompt column")
        prompt, responses = common[:end].lstrip(), [chosen[end:], rejected[end:]]
        for name, response in zip(("chosen", "rejected"), responses, strict=True):
            row.check_text(response, f'the answer in field "{name}"')
    else:
        raise row.bad("not messages", "chosen and rejected must both be texts or both be messages")
    return row.example(prompt, responses, pairs=[(0, 1)], reference=plain(responses[0]), **_soft(row))


def _comparison(row: Fields) -> Example:
    """OpenAI's raw comparisons; what evaluation groups by becomes columns of its own, `policies` as "--".join(sorted(pair))."""
    info, summaries, choice = row.value("info"), row.value("summaries"), row.number("choice")
    if (
        not isinstance(info, dict)
        or not isinstance(summaries, list)
        or len(summaries) != 2
        or not all(isinstance(s, dict) for s in summaries)
    ):
        raise row.bad("not a comparison", 'needs "info" (an object) and "summaries" (two objects)')
    if choice not in (0, 1):
        raise row.bad("not a comparison", f'field "choice" is {_short(row.row.get("choice"))}, not 0 or 1')
    inner = Fields(info, row.where, {})
    if info.get("post"):
        prompt = format_tldr(inner.text("subreddit"), inner.text("title"), inner.text("post"))
    else:
        prompt = format_article(inner.text("article"))
    texts: list[Text] = [" " + row.check_text(s.get("text"), f"summaries[{i}].text").strip() for i, s in enumerate(summaries)]
    first, second = (summaries[int(choice)], summaries[1 - int(choice)])
    columns: dict[str, Any] = {}
    for name in ("policy", "note"):
        columns |= {f"{name}_chosen": first.get(name), f"{name}_rejected": second.get(name)}
    if first.get("policy") is not None and second.get("policy") is not None:
        columns["policies"] = "--".join(sorted((str(first["policy"]), str(second["policy"]))))
    extra = row.row.get("extra")
    columns["confidence"] = (extra if isinstance(extra, dict) else {}).get("confidence", row.row.get("confidence"))
    return row.example(
        prompt, [texts[int(choice)], texts[1 - int(choice)]], pairs=[(0, 1)], reference=plain(texts[int(choice)]), columns=columns
    )


def _ratings(row: Fields) -> Example:
    """Several scored responses to one prompt: every pair of them, the higher score first; equal scores have target 0.5."""
    texts, scores = row.value("responses"), row.value("scores")
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores) or len(texts) < 2:
        raise row.bad("not ratings", 'needs as many "scores" as "responses", and at least two')
    responses: list[Text] = [row.check_text(text, f"responses[{i}]") for i, text in enumerate(texts)]
    values = [row.check_number(score, f"scores[{i}]") for i, score in enumerate(scores)]
    pairs = [(i, j) if values[i] >= values[j] else (j, i) for i, j in combinations(range(len(values)), 2)]
    target = [0.5 if values[i] == values[j] else 1.0 for i, j in pairs]
    best = max(range(len(values)), key=values.__getitem__)
    return row.example(row.text_or_messages("prompt"), responses, pairs=pairs, target=target, reference=plain(responses[best]))


def _labelled(row: Fields) -> Example:
    """Several responses to one prompt and the pairs of them that were compared, the preferred one first; targets and margins a pair."""
    texts, pairs = row.value("responses"), row.value("pairs")
    if not isinstance(texts, list) or not isinstance(pairs, list) or not pairs:
        raise row.bad("not pairs", 'needs a list of "responses" and at least one pair of them in "pairs"')
    check = [row.check_messages if isinstance(text, list) else row.check_text for text in texts]
    responses: list[Text] = [check[i](text, f"responses[{i}]") for i, text in enumerate(texts)]
    for q, pair in enumerate(pairs):
        known = isinstance(pair, list | tuple) and [i for i in pair if type(i) is int and 0 <= i < len(texts)]
        if not known or len(pair) != 2 or len({*known}) != 2:
            raise row.bad("not pairs", f"pairs[{q}] is {_short(pair)}, not two positions of {len(texts)} responses (from 0)")
    soft: dict[str, Any] = {}
    for name in ("target", "margin"):
        values = row.value(name) if name in row else None
        if values is not None and (not isinstance(values, list) or len(values) != len(pairs)):
            raise row.bad("not pairs", f'field "{name}" is {_short(values)}, not one number a pair ({len(pairs)})')
        soft[name] = values and [row.check_number(value, f"{name}[{q}]") for q, value in enumerate(values)]
    if odd := [value for value in soft["target"] or [] if not 0 <= value <= 1]:
        raise row.bad("not a probability", f'field "target" has {odd[0]:g}, not between 0 and 1')
    won = [0.0] * len(texts)
    for (i, j), target in zip(pairs, soft["target"] or [1.0] * len(pairs), strict=True):
        won[i] += target - 0.5
        won[j] -= target - 0.5
    best = max(range(len(won)), key=won.__getitem__)
    return row.example(
        row.text_or_messages("prompt"), responses, pairs=[(i, j) for i, j in pairs], reference=plain(responses[best]), **soft
    )


LABELS = ("label", "completion", "summary", "response")


@dataclass(frozen=True)
class Schema:
    """A set of columns that we know: alternatives are given as a tuple."""

    columns: tuple[str | tuple[str, ...], ...]
    parse: Callable[[Fields], Example]

    def matches(self, row: Fields) -> bool:
        """Whether the row has these columns, null or not."""
        names = {ours for ours in chain(row.row, row.renamed) if row.renamed.get(ours, ours) in row.row}
        return all(bool(names & set((c,) if isinstance(c, str) else c)) for c in self.columns)

    def __str__(self) -> str:
        return " + ".join(c if isinstance(c, str) else "/".join(c) for c in self.columns)


COMPARISON = Schema(("info", "summaries", "choice"), _comparison)
RATINGS = Schema(("prompt", "responses", "scores"), _ratings)
LABELLED = Schema(("prompt", "responses", "pairs"), _labelled)
PAIR = Schema(("prompt", "chosen", "rejected"), _pair)
SHARED = Schema(("chosen", "rejected"), _shared)
MESSAGES = Schema(("messages",), _messages)
TLDR = Schema(("subreddit", "title", "post", "summary"), _tldr)
LABEL = Schema(("prompt", LABELS), _prompt_label)
SFT_SCHEMAS = (LABEL, MESSAGES, TLDR)
PAIR_SCHEMAS = (COMPARISON, LABELLED, RATINGS, PAIR, SHARED)
PROMPT_SCHEMAS = (
    *PAIR_SCHEMAS,
    LABEL,
    Schema(("messages",), _messages_prompt),
    Schema(("subreddit", "title", "post"), _tldr_prompt),
    Schema(("prompt",), _prompt),
)


def examples(
    rows: Iterable[Row], source: str, schemas: tuple[Schema, ...], renamed: Mapping[str, str] | None = None
) -> Iterator[Example | BadRow]:
    """Each row as an Example, or as the BadRow that says what is wrong with it.

    The schema is the first that one of the first hundred rows matches. Raises ValueError where the source has no rows or none matches.
    """
    renamed, rows = dict(renamed or {}), iter(rows)
    head = list(islice(rows, 100))
    if not head:
        raise ValueError(f"{source} has no rows; check that it is the file you mean, and that it was written to its end")
    known = [Fields(row, where, renamed) for where, row in head if isinstance(row, dict)]
    schema = next((schema for schema in schemas if any(schema.matches(row) for row in known)), None)
    if schema is None and known:
        raise ValueError(_unknown(known[0], source, schemas))
    for where, row in chain(head, rows):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield (schema or schemas[0]).parse(Fields(row, where, renamed))
        except BadRow as bad:
            yield bad


def _unknown(row: Fields, source: str, schemas: tuple[Schema, ...]) -> str:
    """What was found, what is accepted, and how to name one's own columns."""
    missing = [f"{ours}: {theirs}" for ours, theirs in row.renamed.items() if theirs not in row.row]
    has = names_of(row.row)
    if missing:
        return f"{row.where}: `columns` says {', '.join(missing)}, but the row has: {has}"
    wanted = {name for schema in schemas for c in schema.columns for name in ((c,) if isinstance(c, str) else c)}
    near = {
        ours: theirs for ours in sorted(wanted) for theirs in difflib.get_close_matches(ours, map(str, row.row), 1, 0.8) if ours != theirs
    }
    hint = ", ".join(f"{ours}: {theirs}" for ours, theirs in near.items()) or "prompt: question, label: answer"
    accepted = "; ".join(map(str, schemas))
    lacks = f'no field "{next(iter(near))}" (has: {has})' if near else f"the columns {has} are none of the sets known here"
    return f"{row.where}: {lacks}. Accepted: {accepted}. Name your own with `columns`, ours: yours, such as {{{hint}}}"
