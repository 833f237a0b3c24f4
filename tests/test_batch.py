"""Batch and Experience: built from lists, cut, joined; masks and columns travel with their rows."""

import pytest
import torch

from lit_rlhf.batch import Batch, Experience, join, pad_cat, trim


def two() -> Batch:
    """Prompt 0 (5 6 7) with responses (1) and (8 9 1), prompt 1 (4) with response (2 1)."""
    batch = Batch.of([[5, 6, 7], [4]], [[1], [8, 9, 1], [2, 1]], [0, 0, 1], columns={"prompt": ["a", "b"], "n": [10, 20]})
    batch.rows = [40, 41]
    return batch


def test_lists_are_padded_on_the_right_with_masks():
    batch = two()
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [4, 0, 0]]
    assert batch.prompt_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.response_ids.tolist() == [[1, 0, 0], [8, 9, 1], [2, 1, 0]]
    assert batch.response_mask.sum(1).tolist() == [1, 3, 2]
    assert (batch.num_prompts, batch.num_responses, batch.prompt_of.tolist()) == (2, 3, [0, 0, 1])
    assert (batch.prompt_ids.dtype, batch.response_mask.dtype, batch.prompt_of.dtype) == (torch.int64, torch.bool, torch.int64)


def test_one_response_a_prompt_by_default_and_none_at_all():
    assert Batch.of([[1], [2]], [[3], [4]]).prompt_of.tolist() == [0, 1]
    empty = Batch.of([[1, 2]])
    assert (empty.num_responses, empty.response_mask.shape) == (0, (0, 0))


@pytest.mark.parametrize(
    "prompts, responses, owner, said",
    [
        ([[1], []], [], None, "prompt 1 has no tokens"),
        ([[1]], [[]], None, "response 0 has no tokens"),
        ([[1]], [[2]], [1], "prompt_of must name one of the 1 prompts"),
        ([[1]], [[2], [3]], [0], "prompt_of"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(prompts, responses, owner, said):
    with pytest.raises(ValueError, match=said):
        Batch.of(prompts, responses, owner)


def test_select_keeps_the_order_and_the_rows_own_prompts():
    batch = two().select([2, 0])
    assert batch.response_ids.tolist() == [[2, 1], [1, 0]]  # cut to the longest that is left
    assert [batch.prompt_ids[m][batch.prompt_mask[m]].tolist() for m in batch.prompt_of] == [[4], [5, 6, 7]]
    assert batch.column("prompt") == ["b", "a"] and batch.column("n") == [20, 10]
    assert [batch.rows[m] for m in batch.prompt_of] == [41, 40]
    one = two().select([1])
    assert (one.num_prompts, one.columns, one.rows) == (1, {"prompt": ["a"], "n": [10]}, [40])


def test_select_prompts():
    batch = two().select_prompts([1])
    assert (batch.prompt_ids.tolist(), batch.columns["n"], batch.num_responses, batch.rows) == ([[4]], [20], 0, [41])


def test_with_responses_drops_what_belonged_to_the_old_ones():
    batch = two()
    batch.pairs, batch.margin, batch.count = torch.tensor([[0, 1]]), torch.ones(1), 3.0
    batch = batch.with_responses(torch.tensor([[9]]), torch.tensor([[True]]), torch.tensor([1]))
    assert (batch.pairs, batch.margin, batch.count) == (None, None, None)
    assert batch.column("prompt") == ["b"]


def test_join_shifts_the_owners():
    both = join([two(), two().select([2])])
    assert both.prompt_of.tolist() == [0, 0, 1, 2]
    assert both.columns == {"prompt": ["a", "b", "b"], "n": [10, 20, 20]}
    assert both.response_mask.sum(1).tolist() == [1, 3, 2, 2]


def test_to_moves_every_tensor():
    batch = two()
    batch.margin = torch.ones(1)
    moved = batch.to("meta")
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 6 and all(x.is_meta for x in tensors)
    assert moved.columns == batch.columns


def test_trim_and_pad_cat():
    ids, mask = trim(torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, False]]))
    assert ids.tolist() == [[1]] and mask.tolist() == [[True]]
    assert trim(ids, torch.tensor([[False]]))[0].shape == (1, 0)
    assert pad_cat([torch.ones(1, 1), torch.ones(1, 2)]).tolist() == [[1, 0], [1, 1]]


def test_experience_select_cuts_all_fields_alike():
    batch = two()
    numbers = {name: torch.arange(9.0).view(3, 3) for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")}
    chosen = Experience(batch, scores=torch.tensor([1.0, 2.0, 3.0]), **numbers).select([2])
    assert chosen.batch.response_ids.tolist() == [[2, 1]]
    assert chosen.scores.tolist() == [3.0]
    assert all(getattr(chosen, name).tolist() == [[6.0, 7.0]] for name in numbers)
