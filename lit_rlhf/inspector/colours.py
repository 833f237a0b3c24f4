"""An inspection as HTML for a notebook or a page: strips of coloured tokens, and the table of all numbers. No script, nothing loaded."""

from html import escape
from typing import Any

from lit_rlhf.report.page import SAMPLES_WARNING
from lit_rlhf.report.text import html, visible

COLUMNS = {  # name -> (heading, what it is)
    "logprob": ("log-prob, policy", "nats, at the sampling temperature"),
    "ref_logprob": ("log-prob, reference", "nats"),
    "kl": ("KL", "log-prob of the policy minus that of the reference, nats; its sum over the response is what is penalised"),
    "reward": ("reward", "minus kl_coef times KL, plus the score on the last token"),
    "value": ("value", "what the value network expects of the rewards from this token on, before it is chosen"),
    "advantage": ("advantage", "how much better this token was than expected (GAE), not whitened"),
    "return": ("return", "advantage + value: what the value network is trained towards"),
}


ABOVE, BELOW = "31 111 235", "214 105 20"  # readable under dark and under light text while they are half transparent
DEEPEST = 0.62
STRIPS = ("advantage", "reward", "kl", "value", "logprob")
MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}
STYLE = """<style>
.lit-tokens { font: 14px/1.5 system-ui, sans-serif; } .lit-tokens p { margin: .5em 0; max-width: 80ch; white-space: pre-wrap; }
.lit-tokens .strip { margin: .7em 0; line-height: 2; } .lit-tokens .strip b { display: block; line-height: 1.4; }
.lit-tokens .strip small { font-weight: normal; opacity: .75; }
.lit-tokens .token, .lit-tokens td.token { font-family: ui-monospace, monospace; white-space: pre-wrap; }
.lit-tokens span.token { padding: .15em .05em; border-radius: 3px; box-shadow: inset 0 -1px rgb(128 128 128 / .35); }
.lit-tokens .special { font-style: italic; } .lit-tokens i { opacity: .5; font-style: normal; }
.lit-tokens .scroll { overflow-x: auto; } .lit-tokens table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.lit-tokens th, .lit-tokens td { padding: .2em .6em; text-align: right; white-space: nowrap; border: 0; }
.lit-tokens th:nth-child(2), .lit-tokens td.token { text-align: left; }
.lit-tokens th { font-weight: 600; border-bottom: 1px solid rgb(128 128 128 / .5); }
</style>"""


def fragment(found: Any) -> str:
    """The Inspection `found` as one <div> with its own style."""
    names = [name for name in COLUMNS if name in found.columns]
    strips = [_strip(found, name, *COLUMNS[name]) for name in STRIPS if name in names]
    parts = [
        f"<p>{html(SAMPLES_WARNING)}</p>",
        f"<details><summary>Prompt</summary><p>{html(found.prompt)}</p></details>",
        f"<p>{html(summary(found))}</p>",
        *strips,
        _table(found, {name: COLUMNS[name][0] for name in names}),
    ]
    return f'{STYLE}<div class="lit-tokens">{"".join(parts)}</div>'


def summary(found: Any) -> str:
    """Score, KL, sum of rewards and length, in one line."""
    score = f"score {found.score:.3f}"
    if found.shaped_score != found.score:
        score += f", replaced by {found.shaped_score:.3f}"
    total = {name: sum(found.columns[name]) for name in ("kl", "reward")}
    end = "ended by itself" if found.finished else "cut off at the limit, it did not end"
    said = f"{score}; KL {total['kl']:.3f} nats; sum of rewards {total['reward']:.3f}; {len(found.tokens)} tokens, {end}."
    return f"{said} Settings: {', '.join(f'{name} {value:g}' for name, value in found.settings.items())}."


def number(value: float) -> str:
    """Four digits behind the point, and no minus before a zero."""
    return f"{value:.4f}".replace("-0.0000", "0.0000")


def marked(token: str) -> str:
    """A token as HTML in which spaces, line ends, tabs and control characters can be seen."""
    shown = "".join(f"<i>{MARKS[c]}</i>" if c in MARKS else escape(visible(c)) for c in token)
    return shown or "<i>∅</i>"


def tint(value: float, largest: float) -> str:
    """The background of a number: blue above 0, orange below, the deeper the nearer to the largest."""
    share = min(abs(value) / largest, 1.0) if largest > 0 else 0.0
    return f"background:rgb({ABOVE if value > 0 else BELOW} / {DEEPEST * share:.2f})"


def _largest(values: list[float]) -> float:
    return max((abs(value) for value in values), default=0.0)


def _strip(found: Any, name: str, title: str, what: str) -> str:
    """The response with each token in the colour of one quantity."""
    values, spans = found.columns[name], []
    for token, special, value in zip(found.tokens, found.special, values, strict=True):
        kind = "token special" if special else "token"
        line = "<br>" if "\n" in token else "<wbr>"
        spans.append(f'<span class="{kind}" style="{tint(value, _largest(values))}" title="{number(value)}">{marked(token)}</span>{line}')
    legend = f"{what}; blue above 0, orange below, deepest at {_largest(values):.3g}"
    return f'<div class="strip" data-name="{name}"><b>{html(title)} <small>{html(legend)}</small></b>{"".join(spans)}</div>'


def _table(found: Any, headings: dict[str, str]) -> str:
    """A row for each token with all its numbers."""
    head = "".join(f"<th>{html(heading)}</th>" for heading in ("", "token", *headings.values()))
    rows = []
    for t, token in enumerate(found.tokens):
        cells = [f"<td>{t + 1}</td>", f'<td class="token{" special" * found.special[t]}">{marked(token)}</td>']
        for name in headings:
            value = found.columns[name][t]
            cells.append(f'<td data-name="{name}" style="{tint(value, _largest(found.columns[name]))}">{number(value)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
