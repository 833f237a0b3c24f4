"""An iterated run as report.html and report.json, and as lines for the terminal."""

from dataclasses import asdict, dataclass
from typing import Any

from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.iterate.evaluation import Gain, gain, preferred_rates, share
from lit_rlhf.iterate.rounds import Round, Row, read_rows
from lit_rlhf.report import Plot, Report, Series, Table, Text

FRESH = (
    "Of each round's prompts some are held out: one pair of each, drawn at random, is labelled and no reward model ever learns from it. "
    "On the diagonal a model meets pairs of the round it was fitted in; right of the pairs of its own round are those of later policies."
)


@dataclass
class Outcome:
    """One finished round."""

    number: int
    labels: dict[str, int]
    after: dict[int, Estimate | None]
    """Accuracy of the round's reward models on the held-out pairs of each round so far."""
    before: Estimate | None
    """Of the round before's models on this round's held-out pairs."""
    gain: Gain | None
    preferred: dict[str, Estimate]


def outcome(now: Round, found: dict[str, Any]) -> Outcome:
    """The round's numbers out of its evaluation.json and labels.jsonl."""
    labels = read_rows(now.labels)
    after = {int(number): share(values) for number, values in found["after"].items()}
    return Outcome(now.number, counts(labels), after, share(found["before"]), gain(found["policies"]), preferred_rates(labels))


def counts(labels: list[Row]) -> dict[str, int]:
    """How many pairs were asked about, answered, tied, and are held out (answered ones)."""
    known = [row for row in labels if row["preferred"] is not None]
    return {
        "asked": len(labels),
        "answered": len(known),
        "ties": sum(row["preferred"] == 0.5 for row in known),
        "held out": sum(row["held_out"] for row in known),
    }


def report(title: str, rounds: list[Outcome], lead: str) -> Report:
    """Accuracy on fresh pairs by round, what PPO gained by round, and what was labelled."""
    page = Report(title, lead, data={"rounds": [asdict(found) for found in rounds]})
    page.add("The reward model on fresh pairs", Text(FRESH), _accuracy_plot(rounds), _accuracy_table(rounds))
    if any(found.gain for found in rounds):
        page.add("PPO by round", _gain_plot(rounds), _gain_table(rounds))
    page.add("Labels", _label_table(rounds), _preferred_table(rounds))
    return page


def _line(name: str, points: list[tuple[int, Estimate]]) -> Series:
    x, found = [number for number, _ in points], [estimate for _, estimate in points]
    return Series(name, x, [e.mean for e in found], [e.low for e in found], [e.high for e in found])


def _accuracy_plot(rounds: list[Outcome]) -> Plot:
    after = [(found.number, e) for found in rounds if (e := found.after.get(found.number)) is not None]
    before = [(found.number, found.before) for found in rounds if found.before is not None]
    series = [_line("refitted on the round's labels", after), _line("the round before's", before)]
    kept = [one for one in series if one.x]
    return Plot("Accuracy on the round's held-out pairs", "round", "share that is right", kept, {"chance": 0.5}, note="Bands are 95%.")


def _accuracy_table(rounds: list[Outcome]) -> Table:
    columns = ["reward model of round", *(f"pairs of round {found.number}" for found in rounds)]
    rows: list[list[Any]] = []
    for at, found in enumerate(rounds):
        later = rounds[at + 1].before if at + 1 < len(rounds) else None
        cells = [found.after.get(other.number) if other.number <= found.number else None for other in rounds]
        if at + 1 < len(rounds):
            cells[at + 1] = later
        rows.append([str(found.number), *cells])
    return Table("Accuracy on held-out pairs", columns, rows)


def _gain_plot(rounds: list[Outcome]) -> Plot:
    known = [(found.number, found.gain) for found in rounds if found.gain is not None]
    golds = [(number, g.gold_gain) for number, g in known if g.gold_gain is not None]
    if golds:
        series = [_line("gold", golds)]
        return Plot("PPO's gain over SFT", "round", "gold reward", series, {"SFT": 0.0}, note="On the same prompts; bands are 95%.")
    series = [_line("score", [(number, g.score) for number, g in known])]
    return Plot("PPO's gain over SFT", "round", "score that the round's PPO learnt from", series, {"SFT": 0.0}, note="Bands are 95%.")


def _gain_table(rounds: list[Outcome]) -> Table:
    known = [(found.number, found.gain) for found in rounds if found.gain is not None]
    exact = any(g.gold is not None for _, g in known)
    columns = ["round", "score gained", *(["gold of SFT", "gold of PPO", "gold gained"] if exact else []), "KL (nats)", "length (tokens)"]
    golds = [[g.sft_gold, g.gold, g.gold_gain] if exact else [] for _, g in known]
    rows = [[str(number), g.score, *own, g.kl, g.length] for (number, g), own in zip(known, golds, strict=True)]
    note = "One response to each validation prompt. Scores are what each round's PPO learnt from and cannot be compared between rounds."
    return Table("PPO from SFT", columns, rows, note=note)


def _label_table(rounds: list[Outcome]) -> Table:
    names = list(rounds[0].labels)
    return Table("Pairs", ["round", *names], [[str(found.number), *(found.labels[name] for name in names)] for found in rounds])


def _preferred_table(rounds: list[Outcome]) -> Table:
    names = sorted({name for found in rounds for name in found.preferred})
    rows = [[str(found.number), *(found.preferred.get(name) for name in names)] for found in rounds]
    note = "How often a policy's response was preferred to another policy's, ties as a half; `current` is the round before's PPO policy."
    return Table("Preferred", ["round", *names], rows, note=note)


def as_text(rounds: list[Outcome]) -> str:
    """One line a round."""
    lines = []
    for found in rounds:
        line = f"round {found.number}: {found.labels['answered']} of {found.labels['asked']} pairs labelled"
        own = found.after.get(found.number)
        line += "" if own is None else f"; reward model right on {own.mean:.1%} ({own.low:.1%} to {own.high:.1%}) of the fresh pairs"
        line += "" if found.before is None else f", the round before's on {found.before.mean:.1%}"
        if found.gain is not None:
            what, e = ("gold", found.gain.gold_gain) if found.gain.gold_gain is not None else ("score", found.gain.score)
            line += f"; PPO - SFT: {what} {e.mean:+.2f} ({e.low:+.2f} to {e.high:+.2f}) at {found.gain.kl.mean:.2f} nats"
        lines.append(line)
    return "\n".join(lines)
