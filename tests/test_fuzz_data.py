"""Random files are loaded, loaded without counted rows, or refused in a message of ours; `tests/fuzz_data.py` runs 10,000."""

import collections
import random

import pytest
from fuzz_data import KINDS, damage, outcomes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_no_file_ends_in_a_librarys_traceback(kind, count):
    found = list(outcomes(kind, seed=7, start=0, stop=count))
    assert not [(number, message) for number, outcome, message in found if outcome == "bug"]
    seen = collections.Counter(outcome for _, outcome, _ in found)
    assert min(seen["loaded"], seen["refused"]) > count / 10 and seen["skipped"] > 0, seen  # the files are neither all sound nor all broken


def test_a_file_is_a_function_of_its_number():
    first, again = ([o for _, o, _ in outcomes("sft", seed=3, start=0, stop=8)] for _ in range(2))
    assert first == again
    assert damage(b"x" * 99, random.Random(5)) == damage(b"x" * 99, random.Random(5))
