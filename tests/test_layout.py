"""The rows that a batch becomes: worked by hand, and the rule of attention by its definition."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from lit_rlhf.attention import may_attend
from lit_rlhf.batch import Batch
from lit_rlhf.layout import pack


def test_the_drawing_in_architecture():
    """Prompts of 4 and 3 tokens with responses of 2, 3 and 2, 2: the trees have 9 and 7 tokens, so each takes a row of 9."""
    batch = Batch.of([[10, 11, 12, 13], [20, 21, 22]], [[31, 32], [33, 34, 35], [41, 42], [43, 44]], [0, 0, 1, 1])
    layout = pack(batch, "rows")
    assert layout.input_ids.tolist() == [[10, 11, 12, 13, 31, 32, 33, 34, 35], [20, 21, 22, 41, 42, 43, 44, 0, 0]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6], [0, 1, 2, 3, 4, 3, 4, 0, 0]]
    # states of response 1: after prompt token 3, then after its own tokens at 6, 7, 8; response 2 sits in row 1, which begins at 9
    assert layout.state_index.tolist() == [[3, 4, 5, 5], [3, 6, 7, 8], [11, 12, 13, 13], [11, 14, 15, 15]]
    assert layout.prompt_index.tolist() == [[0, 1, 2, 3], [9, 10, 11, 11]]
    seen = layout.attention_mask[0, 0]
    assert seen[6].tolist() == [True] * 4 + [False] * 2 + [True] + [False] * 2  # the prompt and itself, not the sibling before it


def whole_mask(trees):
    """What the calls of attention, tree by tree, add up to over the whole row (1, 1, T, T)."""
    blocks = [torch.ones(n, n).tril().bool() if mask is None else mask for n, mask in zip(trees.sizes, trees.masks, strict=True)]
    return torch.block_diag(*blocks)[None, None].bool()


def test_trees_in_one_row_without_padding():
    """The batch above: 9 + 7 tokens one after the other, and a mask only for trees with several branches."""
    batch = Batch.of([[10, 11, 12, 13], [20, 21, 22], [50]], [[31, 32], [33, 34, 35], [41, 42], [61]], [0, 0, 1, 2])
    layout = pack(batch)
    assert layout.input_ids.tolist() == [[10, 11, 12, 13, 31, 32, 33, 34, 35, 20, 21, 22, 41, 42, 50, 61]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1, 2, 3, 4, 0, 1]]
    assert layout.state_index.tolist() == [[3, 4, 5, 5], [3, 6, 7, 8], [11, 12, 13, 13], [14, 15, 15, 15]]
    trees = layout.attention_mask.trees
    assert trees.sizes == [9, 5, 2] and [mask is None for mask in trees.masks] == [False, True, True]
    assert trees.masks[0][6].tolist() == [True] * 4 + [False] * 2 + [True] + [False] * 2


def test_flex_attention_sees_the_same():
    """The block mask of a GPU, made here with its blocks of 128, allows what the trees' own calls allow."""
    draw = random.Random(0)
    lengths = [(draw.randint(1, 60), [draw.randint(1, 20) for _ in range(draw.randint(1, 3))]) for _ in range(9)]
    batch = Batch.of(
        [[1] * p for p, _ in lengths], [[2] * r for _, rs in lengths for r in rs], [m for m, (_, rs) in enumerate(lengths) for _ in rs]
    )
    trees = pack(batch).attention_mask.trees
    index = torch.arange(len(trees.segment))
    allowed = may_attend(trees.segment, trees.branch, None, None, index[:, None], index[None, :])
    assert torch.equal(allowed, whole_mask(trees)[0, 0])
    query, key, value = torch.randn(3, 1, 2, len(index), 16).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=whole_mask(trees))
    found = flex_attention(query, key, value, block_mask=trees.block_mask())
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_short_trees_share_a_row():
    batch = Batch.of([[1, 2], [3], [4]], [[5, 6, 7], [8], [9]])  # trees of 5, 2 and 2 tokens: a row of 5, and a row of 2 + 2
    layout = pack(batch, "rows")
    assert layout.input_ids.tolist() == [[1, 2, 5, 6, 7], [3, 8, 4, 9, 0]]
    assert layout.attention_mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_plain_rows():
    layout = pack(Batch.of([[1, 2], [3]], [[5], [6, 7]], [0, 0]), "plain")
    assert layout.input_ids.tolist() == [[1, 2, 5, 0], [1, 2, 6, 7], [3, 0, 0, 0]]
    assert layout.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert layout.state_index.tolist() == [[1, 2, 2], [5, 6, 7]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["trees", "rows", "plain"])
def test_each_path_reads_back_its_own_tokens(seed, form):
    """Following the attention from any response's last token and sorting by position gives prompt + response, whatever shares the row."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(5, 1000) for _ in range(draw.randint(1, 9))] for _ in range(6)]
    owner = [draw.randrange(6) for _ in range(8)]
    responses = [[draw.randrange(5, 1000) for _ in range(draw.randint(1, 7))] for _ in owner]
    layout = pack(Batch.of(prompts, responses, owner), form)
    masks = whole_mask(layout.attention_mask.trees) if form == "trees" else layout.attention_mask
    width = layout.input_ids.shape[1]
    flat_ids, flat_positions = layout.input_ids.flatten(), layout.position_ids.flatten()
    for n, response in enumerate(responses):
        row, column = divmod(int(layout.state_index[n, len(response)]), width)
        if form != "plain":
            seen = masks[row, 0, column].nonzero().flatten() + row * width
        else:
            seen = torch.arange(column + 1) + row * width
        order = flat_positions[seen].argsort()
        assert flat_ids[seen][order].tolist() == prompts[owner[n]] + response
        assert flat_positions[seen].sort().values.tolist() == list(range(len(seen)))
        assert flat_ids[layout.state_index[n, : len(response) + 1]].tolist() == [prompts[owner[n]][-1], *response]
    for m, prompt in enumerate(prompts):
        assert flat_ids[layout.prompt_index[m, : len(prompt)]].tolist() == prompt


@pytest.mark.parametrize("form", ["trees", "rows"])
def test_packing_computes_a_prompt_once(form):
    batch = Batch.of([[1] * 50], [[2] * 5] * 4, [0] * 4)
    assert pack(batch, form).input_ids.numel() == 50 + 4 * 5
    assert pack(batch, "plain").input_ids.numel() == 4 * 55
