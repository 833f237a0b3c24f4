import itertools

import pytest
import torch

from lit_rlhf.batch import Batch
from lit_rlhf.data.loader import StepLoader, StepNumbers, rolling, run_seed, split_by_tokens


def collate(rows):
    return Batch.of([[1]] * len(rows), columns={"prompt": [""] * len(rows), "row": rows})


def loader(lengths, **kwargs):
    return StepLoader(lengths, kwargs.pop("counts", [1.0] * len(lengths)), collate, **kwargs)


def rows(batches):
    return [batch.columns["row"] for batch in batches]


def test_split_by_tokens_by_hand():
    # Longest first into the lightest part: 9 -> a, 7 -> b, 4 -> b (11), 3 -> a (12), 1 -> b (12). Rows stay in order inside a part.
    assert split_by_tokens([3, 9, 4, 1, 7], 2) == [[0, 1], [2, 3, 4]]
    assert split_by_tokens([5, 5], 2) == [[0], [1]]
    assert split_by_tokens([100, 1, 1], 3) == [[0], [1], [2]]  # every part has a row
    assert split_by_tokens([0, 0, 0], 3) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="2 rows cannot be split into 3 non-empty parts"):
        split_by_tokens([1, 1], 3)


def test_split_is_balanced():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 600, (128,), generator=draw).tolist()
    loads = [sum(lengths[i] for i in part) for part in split_by_tokens(lengths, 8)]
    assert max(loads) - min(loads) < 20
    assert sum(loads) == sum(lengths)


def test_seed(monkeypatch):
    assert run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert run_seed() == 7


def test_each_epoch_has_every_row_in_another_order():
    steps = loader([1] * 10, batch_size=4, shuffle=True)
    assert len(steps) == 3
    first, second, third = rows(steps), rows(steps), rows(steps)
    assert [len(batch) for batch in first] == [4, 4, 2]
    for epoch in (first, second, third):  # lightning-facts: a loader that resets at exhaustion leaves every second epoch empty
        assert sorted(itertools.chain(*epoch)) == list(range(10))
    assert first != second != third
    assert rows(loader([1] * 10, batch_size=4, shuffle=True)) == first
    assert rows(loader([1] * 10, batch_size=4, shuffle=True, seed=1)) != first
    assert rows(loader([1] * 10, batch_size=4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_micro_batches_share_out_the_rows_of_a_step(world, accumulate):
    lengths = [3, 50, 7, 7, 20, 1, 9, 30, 2, 8, 4, 6, 5]
    counts = [float(n) for n in range(13)]
    one = loader(lengths, counts=counts, batch_size=5, shuffle=True)
    parts = [loader(lengths, counts=counts, batch_size=5, shuffle=True, rank=r, world=world, accumulate=accumulate) for r in range(world)]
    assert {len(p) for p in parts} == {len(one) * accumulate - (accumulate * world == 4) * accumulate}  # 3 rows are too few for 4 parts
    whole = [(sorted(batch.columns["row"]), batch.count) for batch in one]
    if accumulate * world == 4:  # so they join the step before
        whole = [whole[0], (sorted(whole[1][0] + whole[2][0]), whole[1][1] + whole[2][1])]
    shares = [list(p) for p in parts]
    for step, (expected, count) in enumerate(whole):
        micro = [share[step * accumulate + m] for share in shares for m in range(accumulate)]
        assert all(batch.columns["row"] for batch in micro)
        assert sorted(itertools.chain(*rows(micro))) == expected
        assert {batch.count for batch in micro} == {count} == {sum(counts[i] for i in expected)}


def test_too_few_rows():
    with pytest.raises(ValueError, match="batch_size 3 is less than accumulate_grad_batches x processes = 2 x 2"):
        loader([1] * 10, batch_size=3, accumulate=2, world=2)
    with pytest.raises(ValueError, match="3 rows are too few for accumulate_grad_batches x processes = 2 x 2"):
        loader([1] * 3, batch_size=4, accumulate=2, world=2)
    assert len(loader([1] * 3, batch_size=4)) == 1


@pytest.mark.parametrize("stop", range(1, 9))
def test_resume_at_every_batch(stop):
    whole = loader([1] * 10, batch_size=4, shuffle=True)
    expected = rows(whole) + rows(whole) + rows(whole)
    first = loader([1] * 10, batch_size=4, shuffle=True)
    seen = []
    for epoch in range(3):
        for batch in itertools.islice(first, min(3, stop - 3 * epoch)):
            seen.append(batch.columns["row"])
        if len(seen) == stop:
            break
    second = loader([1] * 10, batch_size=4, shuffle=True)
    early = iter(second)  # an iterator made before the state arrives, as Lightning does
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    seen += rows(early)
    while len(seen) < 9:
        seen += rows(second)
    assert seen == expected


def test_abandoned_epoch_is_over():
    # limit_train_batches=2: Lightning drops the iterator after two batches. The next epoch begins at its first batch, resumed or not.
    whole = loader([1] * 10, batch_size=4, shuffle=True, limit=2)
    first, second = rows(itertools.islice(whole, 2)), rows(itertools.islice(whole, 2))
    other = loader([1] * 10, batch_size=4, shuffle=True, limit=2)
    assert rows(itertools.islice(other, 2)) == first
    resumed = loader([1] * 10, batch_size=4, shuffle=True, limit=2)
    resumed.load_state_dict(other.state_dict())
    assert rows(itertools.islice(resumed, 2)) == second


def test_resume_with_other_rows_or_batches():
    first = loader([1] * 12, batch_size=4)
    next(iter(first))
    with pytest.raises(
        ValueError, match=r"from the middle of epoch 0 \(batch 1\), and rows was 12 and is 11, batch_size was 4 and is 2: resume"
    ):
        loader([1] * 11, batch_size=2).load_state_dict(first.state_dict())
    halves = loader([1] * 12, batch_size=4, accumulate=2)  # more micro-batches change nothing but the rounding
    halves.load_state_dict(first.state_dict())
    assert sorted(itertools.chain(*rows(halves))) == list(range(4, 12))
    rows(first)
    ended = loader([1] * 11, batch_size=2, shuffle=True)  # at the end of an epoch anything may change
    ended.load_state_dict(first.state_dict())
    assert len(rows(ended)) == 6
    assert ended.epoch == 2


def test_step_numbers():
    numbers = StepNumbers(4)
    assert len(numbers) == 4
    assert list(numbers) == list(numbers) == [0, 1, 2, 3]
    it = iter(numbers)
    assert [next(it), next(it), next(it)] == [0, 1, 2]
    state = numbers.state_dict()
    assert state == {"position": 3, "of": 4}
    other = StepNumbers(4)
    other.load_state_dict(state)
    assert list(other) == [3]
    assert list(other) == [0, 1, 2, 3]
    assert other.state_dict() == {"position": 0, "of": 4}
    halved = StepNumbers(8)  # every step has two micro-batches now
    halved.load_state_dict(state)
    assert list(halved) == [6, 7]


def test_rolling_goes_round_in_permutations():
    stream = rolling(5, 0, 15, 3)
    assert sorted(stream[:5]) == sorted(stream[5:10]) == sorted(stream[10:]) == list(range(5))
    assert rolling(5, 4, 7, 3) == stream[4:11]
    assert rolling(5, 0, 15, 4) != stream
