"""Chat messages as text, through the tokenizer's own template."""

from typing import Any, NamedTuple

from lit_rlhf.data.read import BadRow
from lit_rlhf.data.schemas import Message, Text


class Rendered(NamedTuple):
    """A prompt and its responses as text; `spans` are the (start, end) characters of the prompt's earlier assistant turns."""

    prompt: str
    responses: list[str]
    spans: list[tuple[int, int]]


def render(tokenizer: Any, prompt: Text, responses: list[Text], where: str) -> Rendered:
    """Puts messages through the chat template; a plain prompt stays as it is.

    A response is what the template writes after the generation prompt, without trailing space and EOS (which every response gets as an id).
    """
    if isinstance(prompt, str):
        return Rendered(prompt, [r if isinstance(r, str) else str(r[-1]["content"]) for r in responses], [])
    if not tokenizer.chat_template:
        raise ValueError(f"{where}: messages need a chat template, and the tokenizer has none: set tokenizer.chat_template, or give texts")
    text = _template(tokenizer, prompt, where)
    turns = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
    return Rendered(text, [_answer(tokenizer, prompt, text, turn, where) for turn in turns], _spans(tokenizer, prompt, text, where))


def _template(tokenizer: Any, messages: list[Message], where: str, generate: bool = True) -> str:
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False))
        text.encode()
    except Exception as error:  # a template is a program: it may raise anything over a field of the wrong type
        raise BadRow("chat template", where, f"the tokenizer's chat template refuses the messages: {error}") from error
    return text


def _answer(tokenizer: Any, prompt: list[Message], text: str, turn: list[Message], where: str) -> str:
    whole = _template(tokenizer, [*prompt, *turn], where, generate=False)
    if not whole.startswith(text):  # a template that writes something else into generation prompts, such as an empty thought
        return str(turn[-1]["content"])
    return whole[len(text) :].rstrip()


def _spans(tokenizer: Any, prompt: list[Message], text: str, where: str) -> list[tuple[int, int]]:
    """Where the prompt's assistant turns stand, end-of-turn marks included; a turn that the template rewrites later is left out."""
    spans = []
    for k, message in enumerate(prompt):
        if message["role"] == "assistant" and k > 0:
            start = _template(tokenizer, prompt[:k], where)
            end = _template(tokenizer, prompt[: k + 1], where, generate=False).rstrip()
            if text.startswith(start) and text.startswith(end) and len(end) > len(start):
                spans.append((len(start), len(end)))
    return spans
