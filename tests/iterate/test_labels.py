"""Who labels: by hand, from functions and from files that people filled in."""

import json
import math
from types import SimpleNamespace

import pytest

from lit_rlhf.iterate.evaluation import gain, hits, preferred_rates, share
from lit_rlhf.iterate.labels import Waiting, by_gold, by_judge, by_people, label
from lit_rlhf.iterate.rounds import Round, earlier_comparisons, read_rows, write_comparisons, write_rows


def pair(q: int, first: str, second: str, **more):
    row = {"id": f"1-{q}", "row": q, "prompt": f"p {q}", "first": first, "second": second, "policies": ["sft", "current"]}
    return row | {"held_out": False} | more


PAIRS = [pair(0, "aaa", "b"), pair(1, "c", "dd"), pair(2, "e", "f")]
COLUMNS = {0: {"bonus": 0}, 1: {"bonus": 5}, 2: {"bonus": 1}}


def length(prompts, responses):
    return [len(r) for r in responses]


def test_an_exact_reward():
    assert by_gold(length, PAIRS, COLUMNS, None, (0,)) == [1.0, 0.0, 0.5]


def test_a_reward_gets_the_columns_of_each_row():
    seen = []

    def wants(prompts, responses, bonus):
        seen.append(bonus)
        return [float(b) for b in bonus]

    assert by_gold(wants, PAIRS, COLUMNS, None, (0,)) == [0.5, 0.5, 0.5] and seen == [[0, 5, 1], [0, 5, 1]]


def test_a_careless_labeller_errs_as_bradley_and_terry_say():
    many = [pair(q, "aaa", "b") for q in range(2000)]  # a difference of 2
    said = by_gold(length, many, dict.fromkeys(range(2000), {}), 0.5, (0, 1))
    p = 1 / (1 + math.exp(-1))  # sigmoid(0.5 x 2) = 0.731
    assert set(said) == {0.0, 1.0} and abs(sum(said) / 2000 - p) < 4 * math.sqrt(p * (1 - p) / 2000)
    assert (
        said
        == by_gold(length, many, dict.fromkeys(range(2000), {}), 0.5, (0, 1))
        != by_gold(length, many, dict.fromkeys(range(2000), {}), 0.5, (0, 2))
    )


def test_a_judge_is_averaged_over_both_orders():
    def judge(prompts, first, second):
        return [{"aaa": 0.9, "b": 0.3, "c": None, "dd": 0.5, "e": 0.6, "f": 0.6}[text] for text in first]

    # pair 0: (0.9 + 1 - 0.3)/2 = 0.8; pair 1: no answer in one order; pair 2: (0.6 + 1 - 0.6)/2 = 0.5
    assert by_judge(judge, PAIRS, COLUMNS, "cpu") == [pytest.approx(0.8), None, pytest.approx(0.5)]


def test_people_are_asked_and_answer(tmp_path):
    now = Round(tmp_path, 1)
    with pytest.raises(Waiting, match=r"fill in `preferred` .* in the 3 rows of .*round-1/to_label.jsonl, save them as .*labelled.jsonl"):
        by_people(now, PAIRS)
    shown = read_rows(now.to_label)
    assert [list(row) for row in shown] == [["id", "prompt", "first", "second", "preferred"]] * 3  # nobody sees who wrote what
    answers = {"1-0": "first", "1-1": "", "1-2": 0.25}
    write_rows(now.labelled, [row | {"preferred": answers[row["id"]]} for row in shown[::-1]])
    assert by_people(now, PAIRS) == [1.0, None, 0.25]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"id": "1-0", "preferred": "A"}'], r"labelled.jsonl:1: `preferred` is 'A'; give first, second, tie"),
        (['{"id": "1-0", "preferred": 2}'], "`preferred` is 2; give"),
        (['{"id": "1-0", "preferred": true}'], "`preferred` is True; give"),
        (['{"id": "2-0", "preferred": "tie"}'], "no pair of this round has the id '2-0'"),
        (['{"id": "1-0", "preferred": "tie"}'] * 2, "labelled.jsonl:2: the pair 1-0 is answered twice"),
        (["", '{"id": "1-0"}'], 'labelled.jsonl:2: not an object with "id" and "preferred"'),
        (["[1"], 'labelled.jsonl:1: not an object with "id"'),
    ],
)
def test_what_is_no_answer(tmp_path, lines, said):
    now = Round(tmp_path, 1)
    now.folder.mkdir()
    now.labelled.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=said):
        by_people(now, PAIRS)


def test_nobody_answered(tmp_path):
    now = Round(tmp_path, 1)
    write_rows(now.pairs, PAIRS)
    write_rows(now.responses, [{"row": q, "columns": {}} for q in range(3)])
    options = SimpleNamespace(gold=None, judge=lambda prompts, first, second: [None] * 3, care=None)
    with pytest.raises(ValueError, match="round 1: the judge .* answered none of 3 pairs"):
        label(now, options, (0,), "cpu")
    assert not now.labels.exists()


def test_all_labels_so_far_become_comparisons(tmp_path):
    one, two = Round(tmp_path, 1), Round(tmp_path, 2)
    write_rows(one.labels, [PAIRS[0] | {"preferred": 1.0}, PAIRS[1] | {"preferred": 0.25}, PAIRS[2] | {"preferred": None}])
    write_rows(
        two.labels,
        [
            pair(0, "x", "y", id="2-0", preferred=0.5),
            pair(0, "aaa", "x", id="2-1", preferred=0.0),
            pair(1, "u", "v", id="2-2", preferred=0.0, held_out=True),
        ],
    )
    (tmp_path / "old.jsonl").write_text(json.dumps({"prompt": "o", "responses": ["l", "m", "n"], "scores": [2, 1, 2]}) + "\n")
    assert write_comparisons(two, earlier_comparisons(str(tmp_path / "old.jsonl"))) == (7, 1)
    # a ranking l = n > m is three pairs, the tie with target 0.5; 0.25 for the first is 0.75 for the second
    assert read_rows(two.comparisons) == [
        {"prompt": "o", "responses": ["l", "m", "n"], "pairs": [[0, 1], [0, 2], [2, 1]], "target": [1.0, 0.5, 1.0], "round": 0},
        {"prompt": "p 0", "responses": ["aaa", "b"], "pairs": [[0, 1]], "target": [1.0], "round": 1},
        {"prompt": "p 1", "responses": ["dd", "c"], "pairs": [[0, 1]], "target": [0.75], "round": 1},
        {"prompt": "p 0", "responses": ["x", "y", "aaa"], "pairs": [[0, 1], [0, 2]], "target": [0.5, 1.0], "round": 2},
    ]
    assert [(r["chosen"], r["rejected"], r["target"], r["policies"]) for r in read_rows(two.held_out)] == [("v", "u", 1, "current--sft")]


def test_accuracy_of_an_ensemble_by_hand():
    rows = [pair(0, "aaa", "b", preferred=1.0), pair(1, "c", "dd", preferred=0.9), pair(2, "e", "f", preferred=0.8)]
    rows += [pair(3, "g", "hh", preferred=0.5), pair(4, "i", "jj", preferred=None)]  # no order to get right
    assert hits([length], rows) == [True, False, False]  # the third: equal scores
    # the mean of length and 3 x (is it c?): pair 1 becomes 1 + 3 against 2
    assert hits([length, lambda prompts, responses: [3.0 * (r == "c") for r in responses]], rows) == [True, True, False]
    assert share([]) is None and share([True, False, True, True]).mean == 0.75


def test_how_often_each_policy_is_preferred():
    rows = [pair(0, "a", "b", preferred=1.0), pair(1, "a", "b", preferred=0.25), pair(2, "a", "b", preferred=None)]
    rows += [pair(3, "a", "b", preferred=1.0, policies=["sft", "sft"]), pair(4, "a", "b", preferred=0.5, policies=["reference", "sft"])]
    # sft: 1, 0.25, 0.5; current: 0, 0.75; reference: 0.5
    found = {name: estimate.mean for name, estimate in preferred_rates(rows).items()}
    assert found == pytest.approx({"current": 0.375, "reference": 0.5, "sft": 1.75 / 3})


def test_gain_is_paired():
    sft = {"score": [1.0, 2.0], "gold": [0.0, 4.0], "kl": [0.0, 0.0], "length": [3.0, 5.0]}
    ppo = {"score": [2.0, 5.0], "gold": [1.0, 5.0], "kl": [1.0, 3.0], "length": [4.0, 4.0]}
    found = gain({"SFT": sft, "PPO": ppo})
    assert (found.score.mean, found.kl.mean, found.gold.mean, found.sft_gold.mean) == (2.0, 2.0, 3.0, 2.0)
    assert found.gold_gain.mean == 1.0 and found.gold_gain.error == 0.0  # one point on every prompt, however far the prompts are apart
    assert gain({}) is None
