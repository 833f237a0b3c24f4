import pytest
import torch

from lit_rlhf.functional import last_index, masked_mean, through_first, whiten

T, F = True, False


def test_masked_mean_leaves_out_what_does_not_count():
    x = torch.tensor([1.0, 2.0, 3.0, torch.nan])
    mask = torch.tensor([T, F, T, F])
    assert masked_mean(x, mask).item() == 2.0  # (1 + 3) / 2
    assert masked_mean(x, mask, count=8).item() == 0.5  # (1 + 3) / 8


def test_masked_mean_takes_any_dtype_and_gives_float32():
    x = torch.full((4096,), 1.001, dtype=torch.bfloat16)  # 1.001 is 1.0 in bfloat16; a bfloat16 sum would stop at 256
    assert masked_mean(x, torch.ones(4096, dtype=torch.bool)).item() == 1.0
    assert masked_mean(torch.tensor([T, F, T, T]), torch.tensor([T, T, T, T])).item() == 0.75


def test_masked_mean_gradient_stays_finite_beside_nan():
    x = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    masked_mean(x, torch.tensor([T, F, F])).backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0]


def test_an_empty_mask_is_an_error_unless_the_count_is_given():
    x, empty = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask .* is empty"):
        masked_mean(x, empty)
    for count in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="count="):
            masked_mean(x, empty, count=count)
    loss = masked_mean(x, empty, count=5)  # an empty micro-batch of a step that has 5 tokens elsewhere
    loss.backward()
    assert loss.item() == 0.0 and x.grad.abs().sum() == 0.0


def test_whiten_by_hand():
    x = torch.tensor([[1.0, 3.0, 1000.0]])
    mask = torch.tensor([[T, T, F]])
    # mean 2, deviations -1 and 1: biased variance 1, unbiased 2; what stands outside the mask changes nothing and comes out as 0
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]))
    torch.testing.assert_close(whiten(x, mask, unbiased=True), torch.tensor([[-(0.5**0.5), 0.5**0.5, 0.0]]))
    torch.testing.assert_close(whiten(x * 10, mask), torch.tensor([[-1.0, 1.0, 0.0]]))


def test_keep_mean_keeps_the_mean():
    x = torch.tensor([10.0, 14.0, torch.nan])
    mask = torch.tensor([T, T, F])
    # mean 12, deviation 2: -1 and 1 without the mean, 11 and 13 with it
    torch.testing.assert_close(whiten(x, mask, keep_mean=True), torch.tensor([11.0, 13.0, 0.0]))
    assert whiten(x, mask)[:2].mean().item() == 0.0  # the flag's name says what is true afterwards: off means centred


def test_whiten_of_equal_values_is_zero_and_of_nothing_an_error():
    assert whiten(torch.full((4,), 3.0), torch.ones(4, dtype=torch.bool)).tolist() == [0.0] * 4
    with pytest.raises(ValueError):
        whiten(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError):
        whiten(torch.ones(3), torch.tensor([F, T, F]), unbiased=True)


def test_last_index_is_an_index_not_a_length():
    mask = torch.tensor([[T, F, F], [T, T, T], [T, F, T], [F, T, F]])
    assert last_index(mask).tolist() == [0, 2, 2, 1]
    assert last_index(mask).dtype == torch.int64
    assert last_index(torch.zeros(0, 3, dtype=torch.bool)).tolist() == []


@pytest.mark.parametrize("width", [0, 2])
def test_last_index_names_the_empty_rows(width):
    mask = torch.zeros(3, width, dtype=torch.bool)
    mask[:2, :1] = True
    with pytest.raises(ValueError, match=r"rows \[2\]" if width else r"rows \[0, 1, 2\]"):
        last_index(mask)


def test_through_first_includes_the_hit():
    hits = torch.tensor([[F, T, F, T], [F, F, F, F], [T, F, F, F], [F, F, F, T]])
    expected = [[T, T, F, F], [T, T, T, T], [T, F, F, F], [T, T, T, T]]
    assert through_first(hits).tolist() == expected
    assert through_first(hits).dtype == torch.bool
    assert through_first(hits[:, :0]).shape == (4, 0)
