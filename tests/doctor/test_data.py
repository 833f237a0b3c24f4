"""Data that was cut, or that stands in two splits."""

import pytest
from handover import text, write_rows

from lit_rlhf.doctor.data import shared_prompts, truncation
from lit_rlhf.doctor.finding import NotMeasurable


def test_whole_responses_pass(case):
    assert truncation(case()).status == "pass"


def test_summaries_cut_to_a_number_of_words(case, reference_rows):
    cut = [row | {"label": " ".join(row["label"].split()[:5])} for row in reference_rows]  # of 4 to 8 words: three fifths are cut
    found = truncation(case(data=[cut]))
    assert found.status == "fail" and "exactly 5 words" in found.measured and "cut at a limit" in found.reason
    assert found.numbers["responses_cut/data"] == pytest.approx(0.6, abs=0.02)


def test_summaries_cut_to_a_number_of_characters(case, reference_rows):
    cut = [row | {"label": row["label"].strip()[:14].strip("t") + "t"} for row in reference_rows]
    assert "characters" in truncation(case(data=[cut])).measured


def test_short_labels_are_not_cut(case):
    rows = [{"prompt": text(i, 5), "label": ["positive", "negative"][i % 2]} for i in range(80)]
    assert truncation(case(data=[rows])).status == "pass"


def test_posts_cut_to_max_prompt_tokens(case):
    found = truncation(case(max_prompt_tokens=8))
    assert found.status == "fail" and "of the prompts" in found.measured


def test_rows_that_cannot_be_read(case, reference_rows):
    found = truncation(case(data=[[*reference_rows, {"prompt": "x", "label": None}]]))
    assert found.status == "warn" and "1.0% of the rows" in found.measured


def test_shared_prompts(case, tmp_path, reference_rows, judged_rows):
    train, held = write_rows(tmp_path / "train.jsonl", reference_rows), write_rows(tmp_path / "valid.jsonl", reference_rows[:10])
    found = shared_prompts(case(data=[train, held]))
    assert found.status == "fail" and "100.0% of the prompts of" in found.measured
    apart = write_rows(tmp_path / "test.jsonl", [{"prompt": "nothing of this", "label": "x"}])
    assert shared_prompts(case(data=[train, apart])).status == "pass"


def test_prompts_shared_with_another_stage(case, tmp_path, reference_rows):
    train = write_rows(tmp_path / "sft_train.jsonl", reference_rows)
    pairs = [{"prompt": row["prompt"], "chosen": "a b", "rejected": "c"} for row in reference_rows]
    assert shared_prompts(case(data=[train, write_rows(tmp_path / "pairs-valid.jsonl", pairs)])).status == "warn"


def test_needs_two_splits(case):
    with pytest.raises(NotMeasurable, match="held-out"):
        shared_prompts(case())
