"""What a reward model is worth on held-out pairs: accuracy by group, calibration, length bias, agreement of people, disagreements."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlhf.functional.preferences import calibration_floor, difference_correlation, label_agreement
from lit_rlhf.functional.statistics import Estimate, calibration_error, confidence_bin, grouped_mean, grouped_share, reliability
from lit_rlhf.metrics import group_columns
from lit_rlhf.report.figures import Bars, Plot, Series, histogram
from lit_rlhf.report.page import Answer, Report, Sample, Samples, Table, Text

BINS = 10
MATCHED = 0.1  # lengths that differ by at most this share of the longer one (or a token) count as the same
MAX_GROUPS, SHOWN_GROUPS = 50, 16  # columns of more values are no groups; the largest are drawn
LENGTH_BANDS = 5
SHOWN_DISAGREEMENTS, SHOWN_POINTS = 12, 1000
SHOWN_CHARACTERS = 1500  # of a prompt in the list of disagreements


@dataclass
class ScoredPairs:
    """Q pairs that a person decided, with a reward model's scores; lists and tensors have one entry per pair.

    Pairs whose two responses were called equal (target 0.5) belong in it too: they are counted and left out.
    """

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    scores: Tensor
    """(Q, 2), of chosen and rejected."""
    lengths: Tensor
    """(Q, 2) tokens, EOS included."""
    target: Tensor
    """(Q,) the probability that chosen is the better one."""
    columns: dict[str, list[Any]]

    def select(self, index: Tensor) -> "ScoredPairs":
        """These pairs alone."""
        rows = index.tolist()
        prompts, chosen, rejected = ([part[i] for i in rows] for part in (self.prompts, self.chosen, self.rejected))
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return ScoredPairs(prompts, chosen, rejected, self.scores[index], self.lengths[index], self.target[index], columns)

    def decided(self) -> "ScoredPairs":
        """Without the ties, and with the preferred response as `chosen` throughout."""
        kept = self.select((self.target != 0.5).nonzero().flatten())
        flip = kept.target < 0.5
        swap = flip.tolist()
        kept.chosen, kept.rejected = (
            [b if s else a for a, b, s in zip(kept.chosen, kept.rejected, swap, strict=True)],
            [a if s else b for a, b, s in zip(kept.chosen, kept.rejected, swap, strict=True)],
        )
        kept.scores = torch.where(flip[:, None], kept.scores.flip(1), kept.scores).double()
        kept.lengths = torch.where(flip[:, None], kept.lengths.flip(1), kept.lengths)
        kept.target = torch.where(flip, 1 - kept.target, kept.target)
        return kept

    @property
    def margins(self) -> Tensor:
        """(Q,) score of chosen minus score of rejected."""
        return self.scores[:, 0] - self.scores[:, 1]

    @property
    def length_differences(self) -> Tensor:
        """(Q,) tokens of chosen minus tokens of rejected."""
        return (self.lengths[:, 0] - self.lengths[:, 1]).double()

    @property
    def matched(self) -> Tensor:
        """(Q,) bool: the two are of the same length, see MATCHED."""
        return self.length_differences.abs() <= (MATCHED * self.lengths.max(1).values).clamp(min=1)

    @cached_property
    def groups(self) -> Tensor:
        """(Q,) a number for each prompt: pairs of one prompt are not independent."""
        return numbers(self.prompts)

    def accuracy(self, mask: Tensor | None = None) -> Estimate:
        """The share of pairs (where `mask`) whose chosen response scores strictly higher; pairs of one prompt go together."""
        right, groups = self.margins > 0, self.groups
        return grouped_share(right, groups) if mask is None else grouped_share(right[mask], groups[mask])


def numbers(values: Sequence[Any]) -> Tensor:
    """(n,) int64, equal where the values are."""
    known: dict[Any, int] = {}
    return torch.tensor([known.setdefault(value, len(known)) for value in values], dtype=torch.long)


def reward_report(pairs: ScoredPairs, title: str = "Reward model", lead: str = "") -> Report:
    """The report of these pairs, with its headline numbers in `data`. Raises ValueError where no pair is decided."""
    ties, pairs = int((pairs.target == 0.5).sum()), pairs.decided()
    if not len(pairs.prompts):
        raise ValueError(f"no pairs to report on: {ties} ties and nothing else; give data in which people preferred one of the two")
    report = Report(title, lead)
    overall = headline(pairs, ties)
    report.data = {name: value for name, (value, _, _) in overall.items()}
    table = Table("", ["", "value", "reading"], [[what, value, reading] for value, what, reading in overall.values()])
    report.add("In short", table)
    report.add("By group", *_by_column(pairs))
    report.add("Calibration", *_calibration(pairs))
    report.add("Length", *_length(pairs))
    people = _people(pairs)
    if people:
        report.add("People among themselves", *people)
    report.add("Largest disagreements", *_disagreements(pairs))
    return report


def headline(pairs: ScoredPairs, ties: int = 0) -> dict[str, tuple[Any, str, str]]:
    """key -> (value, what it is, how to read it)."""
    margins, bins = pairs.margins, reliability(*_confidence(pairs), BINS)
    longer = pairs.length_differences != 0
    shares = {  # None where all pairs are of one length
        "longer_chosen": grouped_share(pairs.length_differences[longer] > 0, pairs.groups[longer]) if longer.any() else None,
        "longer_scored": grouped_share((margins * pairs.length_differences)[longer] > 0, pairs.groups[longer]) if longer.any() else None,
    }
    correlation = difference_correlation(margins, pairs.length_differences)
    return {
        "pairs": (len(margins), "pairs", f"of {len(set(pairs.prompts)):,} prompts; {ties:,} ties left out"),
        "accuracy": (pairs.accuracy(), "accuracy", "the share whose preferred response scores higher; chance is 0.5, in brackets 95%"),
        "loss": (grouped_mean(-logsigmoid(margins), pairs.groups), "loss (nats per pair)", "0.693 is what knowing nothing costs"),
        "score_ties": (
            float((margins == 0).double().mean()),
            "equal scores",
            "count as wrong; more than a few: scores are cut off or coarse",
        ),
        "ece": (calibration_error(bins), "calibration error (ECE)", "how far stated confidence is from the share that is right"),
        "ece_floor": (
            calibration_floor(_confidence(pairs)[0], BINS),
            "ECE by chance",
            "that of a perfectly calibrated model on as many pairs",
        ),
        "mean_confidence": (
            float(_confidence(pairs)[0].mean()),
            "mean confidence",
            "above the accuracy: scores too far apart; below: too close",
        ),
        "accuracy_matched": (
            _share(pairs, pairs.matched),
            "accuracy at matched length",
            "on pairs whose lengths differ by a tenth or less",
        ),
        "longer_chosen": (shares["longer_chosen"], "people prefer the longer", "where lengths differ; what 'longer wins' would get right"),
        "longer_scored": (
            shares["longer_scored"],
            "the model prefers the longer",
            "above the line before: it likes length more than people do",
        ),
        "length_correlation": (correlation, "correlation with length", "of score difference and length difference within pairs"),
        "length_variance": (
            correlation**2,
            "explained by length",
            "the share of score differences' variance that a line in length explains",
        ),
    }


def _share(pairs: ScoredPairs, mask: Tensor) -> Estimate | None:
    return pairs.accuracy(mask) if mask.any() else None


def _confidence(pairs: ScoredPairs) -> tuple[Tensor, Tensor]:
    """The probability given to the side that scores higher, and whether that side was preferred."""
    return torch.sigmoid(pairs.margins.abs()), pairs.margins > 0


def accuracy_bars(title: str, found: Sequence[tuple[str, int, Estimate]], note: str = "") -> Bars:
    """A bar with its interval for each (name, pairs, accuracy)."""
    names, values = [name for name, _, _ in found], [e.mean for _, _, e in found]
    low, high, texts = [e.low for _, _, e in found], [e.high for _, _, e in found], [f"{e.mean:.2f} of {n:,}" for _, n, e in found]
    return Bars(title, "share of pairs", names, values, low, high, texts, levels={"chance": 0.5}, range=(0.0, 1.0), note=note)


def _by_column(pairs: ScoredPairs) -> list[Bars | Table | Text]:
    """Accuracy by every column of few values."""
    figures: list[Bars | Table | Text] = []
    rows = []
    for column, values in group_columns(pairs.columns).items():
        known = sorted({v for v in values if v is not None}, key=_by_number)
        if not 2 <= len(known) <= MAX_GROUPS:
            continue
        number = {value: i for i, value in enumerate(known)}
        which = torch.tensor([number.get(value, -1) for value in values])
        found = [(str(value), int((which == i).sum()), pairs.accuracy(which == i)) for i, value in enumerate(known)]
        rows += [[column, *group] for group in found]
        least = sorted((n for _, n, _ in found), reverse=True)[:SHOWN_GROUPS][-1]
        shown = [group for group in found if group[1] >= least][:SHOWN_GROUPS]
        note = f"The {len(shown)} largest of {len(found)} groups." if len(shown) < len(found) else ""
        figures.append(accuracy_bars(f"Accuracy by {column}", shown, note))
    if not rows:
        return [Text("No column of the data has between 2 and 50 short values, so there is nothing to group by.", soft=True)]
    note = "Of many groups one in twenty lies outside its 95% interval by chance."
    return [*figures, Table("Accuracy by group", ["column", "value", "pairs", "accuracy"], rows, note=note, folded=True)]


def _by_number(value: Any) -> tuple[Any, ...]:
    """Sorts w2 before w10, and numbers before texts."""
    parts = re.split(r"(\d+)", value) if isinstance(value, str) else []
    return (1, [(int(p), "") if p.isdecimal() else (0, p) for p in parts]) if parts else (0, value)


def _calibration(pairs: ScoredPairs) -> list[Plot | Table]:
    bins = reliability(*_confidence(pairs), BINS)
    confidence, right = _confidence(pairs)
    which = confidence_bin(confidence, BINS)
    intervals = [grouped_share(right[mask], pairs.groups[mask]) for mask in (which == i for i in range(BINS)) if mask.any()]
    diagram = Plot(
        "Reliability",
        "confidence: sigmoid of the score difference",
        "share that is right",
        [
            Series(
                "",
                [b.confidence for b in bins],
                [b.accuracy for b in bins],
                [i.low for i in intervals],
                [i.high for i in intervals],
                kind="points",
                hints=[f"{b.size:,} pairs: confidence {b.confidence:.2f}, right {b.accuracy:.2f}" for b in bins],
            )
        ],
        diagonal=True,
        x_range=(0.5, 1.0),
        y_range=(0.4, 1.0),
        note="Below the diagonal the model is surer than it should be. Bars are 95%.",
    )
    spread = histogram(
        "Score differences",
        "score of preferred - other",
        {"": pairs.margins.tolist()},
        note="Left of 0 the model disagrees with the person.",
    )
    scores = {"preferred": pairs.scores[:, 0].tolist(), "other": pairs.scores[:, 1].tolist()}
    rows = [[b.confidence, i, b.size] for b, i in zip(bins, intervals, strict=True)]
    return [
        diagram,
        spread,
        histogram("Scores", "score", scores, note="Over all prompts: a shift between the two is what the model learned."),
        Table("Reliability", ["mean confidence", "share right", "pairs"], rows, folded=True),
    ]


def _length(pairs: ScoredPairs) -> list[Bars | Plot | Text]:
    difference, margins = pairs.length_differences, pairs.margins
    if not (difference != 0).any():
        return [Text("In every pair both responses are of the same length: nothing to say about length here.")]
    cases = {
        "all pairs": torch.ones_like(pairs.matched),
        "same length (±10%)": pairs.matched,
        "the longer preferred": difference > 0,
        "the shorter preferred": difference < 0,
    }
    found = [(name, int(mask.sum()), pairs.accuracy(mask)) for name, mask in cases.items() if mask.any()]
    bands = [(mask, grouped_share(margins[mask] > 0, pairs.groups[mask])) for mask in length_bands(difference, LENGTH_BANDS)]
    drawn = torch.linspace(0, len(margins) - 1, min(len(margins), SHOWN_POINTS)).long()  # evenly taken where there are too many
    x, y = difference[drawn], margins[drawn]
    return [
        accuracy_bars(
            "Accuracy and length",
            found,
            "A model that only counts tokens is right where the longer is preferred and wrong where the shorter is.",
        ),
        Plot(
            "Accuracy by length difference",
            "tokens of preferred - other",
            "share that is right",
            [
                Series(
                    "",
                    [float(difference[mask].mean()) for mask, _ in bands],
                    [e.mean for _, e in bands],
                    [e.low for _, e in bands],
                    [e.high for _, e in bands],
                    kind="points",
                    hints=[
                        f"{int(difference[m].min())} to {int(difference[m].max())} tokens: {e.mean:.2f} of {int(m.sum()):,}"
                        for m, e in bands
                    ],
                )
            ],
            levels={"chance": 0.5},
            y_range=(0.0, 1.0),
            note="Level is good: the same accuracy whichever is longer. Rising to the right is length bias.",
        ),
        Plot(
            "Scores and length",
            "tokens of preferred - other",
            "score of preferred - other",
            [Series("", x.tolist(), y.tolist(), kind="points")],
            levels={"": 0.0},
            note=f"A correlation of {difference_correlation(margins, difference):+.2f} through the origin." + _of(len(drawn), len(margins)),
        ),
    ]


def _of(shown: int, total: int) -> str:
    return f" {shown:,} of {total:,} pairs are drawn." if shown < total else ""


def length_bands(values: Tensor, count: int) -> list[Tensor]:
    """Masks that part the values at their quantiles into at most `count` bands; equal values stay together, and no band is empty."""
    edges = torch.quantile(values.double(), torch.linspace(0, 1, count + 1, dtype=torch.double)[1:-1])
    which = torch.searchsorted(edges.unique(), values.double())
    return [mask for i in range(count) if (mask := which == i).any()]


def _people(pairs: ScoredPairs) -> list[Bars | Text]:
    """Where several people decided between the same two responses: how often two of them agree, and how often the model agrees with one."""
    ordered = [a <= b for a, b in zip(pairs.chosen, pairs.rejected, strict=True)]
    items = numbers([(p, *sorted(two)) for p, *two in zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)])
    agreement = label_agreement(items, torch.tensor(ordered))
    if agreement is None:
        return []
    several = torch.bincount(items)[items] > 1
    found = [("two people", int(several.sum()), agreement), ("model and a person", int(several.sum()), pairs.accuracy(several))]
    text = (
        f"{len(items[several].unique()):,} pairs of responses were labelled more than once. A model that agrees with a person more often "
        "than two people agree is not wiser than they: it tells what most would say, without one person's slips."
    )
    return [Text(text), accuracy_bars("Agreement on pairs that several people labelled", found)]


def _disagreements(pairs: ScoredPairs) -> list[Samples | Text]:
    worst = pairs.margins.argsort()[:SHOWN_DISAGREEMENTS].tolist()
    samples, groups = [], group_columns(pairs.columns)
    for i in [i for i in worst if pairs.margins[i] < 0]:
        chosen, rejected = pairs.scores[i].tolist()
        known = [f"{name} {values[i]}" for name, values in groups.items() if values[i] is not None]
        answers = [Answer("preferred", pairs.chosen[i], chosen), Answer("other", pairs.rejected[i], rejected)]
        samples.append(
            Sample(shorten(pairs.prompts[i], SHOWN_CHARACTERS), [*answers, *([Answer("row", ", ".join(known))] if known else [])])
        )
    return [Samples(samples, "the reward model's scores")] if samples else [Text("None: the model agrees with every choice.")]


def shorten(text: str, characters: int) -> str:
    """The text with its middle left out where it is longer."""
    half = characters // 2
    return text if len(text) <= characters else f"{text[:half]} […] {text[-half:]}"
