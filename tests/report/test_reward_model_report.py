"""The reward model's report: six pairs worked by hand, and what the figures do where there is little to show."""

import math
import time

import pytest
import torch
from report_pages import EVIL

from lit_rlhf.report import Bars, Samples
from lit_rlhf.report.page import page
from lit_rlhf.report.reward import ScoredPairs, headline, length_bands, reward_report, shorten


def hand() -> ScoredPairs:
    """Six pairs of three prompts, of which one is a tie and one prefers the second."""
    #             decided: margin, length difference (tokens)
    # 0 p1 a>b     2 - 0 = 2        10 - 5 = 5     right, longer preferred
    # 1 p1 c>d     0 - 1 = -1       4 - 8 = -4     wrong, shorter preferred
    # 2 p2 (tie)   left out
    # 3 p2 f>e     3 - 1 = 2        20 - 10 = 10   right, stored the other way round (target 0)
    # 4 p3 g>i     0 - 0 = 0        10 - 10 = 0    equal scores: wrong; same length
    # 5 p3 h>j     1 - 2 = -1       20 - 19 = 1    wrong; lengths within a tenth
    return ScoredPairs(
        prompts=["p1", "p1", "p2", "p2", "p3", "p3"],
        chosen=["a", "c", "x", "e", "g", "h"],
        rejected=["b", "d", "y", "f", "i", "j"],
        scores=torch.tensor([[2.0, 0], [0, 1], [5, 5], [1, 3], [0, 0], [1, 2]]),
        lengths=torch.tensor([[10, 5], [4, 8], [3, 3], [10, 20], [10, 10], [20, 19]]),
        target=torch.tensor([1.0, 1, 0.5, 0, 1, 1]),
        columns={"worker": ["a", "b", "a", "b", "a", None], "post": ["x" * 50] * 6, "confidence": [9, 1, 5, 9, 1, 1]},
    )


def test_a_pair_is_turned_so_that_the_preferred_comes_first():
    pairs = hand().decided()
    assert pairs.prompts == ["p1", "p1", "p2", "p3", "p3"]
    assert pairs.chosen == ["a", "c", "f", "g", "h"] and pairs.rejected == ["b", "d", "e", "i", "j"]
    assert pairs.margins.tolist() == [2, -1, 2, 0, -1] and pairs.length_differences.tolist() == [5, -4, 10, 0, 1]
    assert pairs.matched.tolist() == [False, False, False, True, True]
    assert pairs.columns["worker"] == ["a", "b", "b", "a", None] and pairs.groups.tolist() == [0, 0, 1, 2, 2]


def test_headline_by_hand():
    found = {name: value for name, (value, _, _) in headline(hand().decided(), ties=1).items()}
    assert found["pairs"] == 5 and found["accuracy"].mean == pytest.approx(2 / 5)
    # log(1 + e^-m) for 2, -1, 2, 0, -1
    assert found["loss"].mean == pytest.approx((2 * math.log1p(math.exp(-2)) + 2 * math.log1p(math.e) + math.log(2)) / 5)
    assert found["score_ties"] == pytest.approx(0.2)
    # confidence .8808 twice (right), .7311 twice (wrong), .5 once (wrong): bins of .05 hold them apart
    high, middle = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert found["mean_confidence"] == pytest.approx((2 * high + 2 * middle + 0.5) / 5)
    assert found["ece"] == pytest.approx(2 / 5 * (1 - high) + 2 / 5 * middle + 1 / 5 * 0.5)
    assert found["accuracy_matched"].mean == 0.0
    assert found["longer_chosen"].mean == pytest.approx(3 / 4)  # 5, -4, 10 and 1
    assert found["longer_scored"].mean == pytest.approx(3 / 4)  # 2x5 > 0, -1x-4 > 0, 2x10 > 0, -1x1 < 0
    # margins and differences: 10 + 4 + 20 + 0 - 1 = 33; squares 10 and 142
    assert found["length_correlation"] == pytest.approx(33 / math.sqrt(10 * 142))
    assert found["length_variance"] == pytest.approx(33**2 / 1420)


def test_groups_are_those_of_the_data():
    report = reward_report(hand())
    (section,) = (s for s in report.sections if s.title == "By group")
    rows = {(row[0], row[1]): (row[2], round(row[3].mean, 3)) for row in section.blocks[-1].rows}
    assert rows == {("worker", "a"): (2, 0.5), ("worker", "b"): (2, 0.5), ("confidence", "1"): (3, 0.0), ("confidence", "9"): (2, 1.0)}
    assert [b.title for b in section.blocks if isinstance(b, Bars)] == ["Accuracy by worker", "Accuracy by confidence"]


def test_people_among_themselves():
    # prompt p, responses a and b: labels a>b, a>b, b>a: one of three pairs of labels agrees. The model says a > b: right on two of three.
    pairs = ScoredPairs(
        ["p", "p", "p", "q"],
        ["a", "a", "b", "c"],
        ["b", "b", "a", "d"],
        torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]]),
        torch.ones(4, 2, dtype=torch.long),
        torch.ones(4),
        {},
    )
    report = reward_report(pairs)
    (section,) = (s for s in report.sections if s.title == "People among themselves")
    text, bars = section.blocks
    assert text.text.startswith("1 pairs of responses") and list(bars.values) == pytest.approx([1 / 3, 2 / 3])
    assert not [s for s in reward_report(hand()).sections if s.title == "People among themselves"]


def test_the_largest_disagreements_come_first_with_their_texts():
    (samples,) = reward_report(hand()).sections[-1].blocks
    assert isinstance(samples, Samples) and len(samples.samples) == 2  # equal scores are no disagreement
    first = samples.samples[0]
    assert [a.text for a in first.answers] == ["c", "d", "worker b, confidence 1"] and [a.number for a in first.answers] == [0, 1, None]


def test_every_text_is_escaped():
    pairs = hand()
    pairs.prompts[1] = pairs.chosen[1] = pairs.columns["worker"][1] = EVIL
    html = page(reward_report(pairs, EVIL, EVIL))
    assert "<script" not in html and html.count("&lt;script&gt;") >= 6


def test_a_model_that_agrees_with_all_and_lengths_that_never_differ():
    pairs = hand().select(torch.tensor([0]))
    pairs.lengths[:] = 7
    html = page(reward_report(pairs))
    assert "agrees with every choice" in html and "of the same length" in html and "nothing to group by" in html and "nan" not in html


def test_ties_alone_are_refused():
    with pytest.raises(ValueError, match="1 ties and nothing else"):
        reward_report(hand().select(torch.tensor([2])))


def test_bands_by_hand():
    masks = length_bands(torch.tensor([1.0, 2, 3, 4, 5, 6]), 3)
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[0, 1], [2, 3], [4, 5]]
    assert len(length_bands(torch.zeros(5), 4)) == 1
    assert sum(int(m.sum()) for m in length_bands(torch.randn(101), 5)) == 101


def test_long_prompts_keep_both_ends():
    assert shorten("abcdefgh", 4) == "ab […] gh" and shorten("abcd", 4) == "abcd"


def test_thirty_thousand_pairs_take_seconds(tmp_path):
    """A third of what OpenAI's TL;DR comparisons have for training; the time is linear."""
    count = 30_000
    generator = torch.Generator().manual_seed(0)
    pairs = ScoredPairs(
        [f"prompt {i // 3}" for i in range(count)],
        [f"chosen {i}" for i in range(count)],
        [f"rejected {i}" for i in range(count)],
        torch.randn(count, 2, generator=generator),
        torch.randint(5, 60, (count, 2), generator=generator),
        torch.ones(count),
        {"worker": [f"w{i % 40}" for i in range(count)], "policies": [f"{i % 7}--{i % 11}" for i in range(count)]},
    )
    begin = time.process_time()
    reward_report(pairs).write(tmp_path)
    assert time.process_time() - begin < 4
    assert (tmp_path / "report.html").stat().st_size < 2e6
