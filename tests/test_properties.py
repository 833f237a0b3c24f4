"""What must hold for every input: layout, masks, GAE. The expected values come from the definitions, in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.batch import Batch
from lit_rlhf.functional import gae, last_index, masked_mean, through_first, whiten
from lit_rlhf.layout import pack

steady = settings(derandomize=True, deadline=None, max_examples=60, database=None)
NUMBERS = st.floats(-100, 100, width=32)


@st.composite
def trees(draw):
    """Lengths of 1 to 5 prompts and of the 0 to 7 responses that belong to them, as (prompt lengths, [(owner, length)])."""
    prompts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    return prompts, draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 5)), max_size=7))


def batch_of(prompts, responses) -> tuple[Batch, dict[int, tuple[int, int, int]]]:
    """A batch whose every token has an id of its own, and id -> (prompt, branch, place in its path); branch -1 is the prompt itself."""
    ids, home = iter(range(1, 1000)), {}

    def run(length: int, prompt: int, branch: int, first: int) -> list[int]:
        tokens = [next(ids) for _ in range(length)]
        home.update({token: (prompt, branch, first + i) for i, token in enumerate(tokens)})
        return tokens

    rows = [run(length, m, -1, 0) for m, length in enumerate(prompts)]
    answers = [run(length, m, n, prompts[m]) for n, (m, length) in enumerate(responses)]
    return Batch.of(rows, answers, [m for m, _ in responses]), home


def may_attend(i: tuple[int, int, int], j: tuple[int, int, int]) -> bool:
    """The rule of architecture.md: j stands before i (or is i) in the same tree, and in the prompt or in i's own branch."""
    return i[0] == j[0] and j[2] <= i[2] and j[1] in (-1, i[1])


@given(trees())
@steady
def test_packed_rows_hold_each_token_once_and_show_it_its_own_path_alone(tree):
    batch, home = batch_of(*tree)
    layout = pack(batch, "rows")
    assert sorted(layout.input_ids[layout.input_ids > 0].tolist()) == sorted(home)
    for row, positions, mask in zip(layout.input_ids.tolist(), layout.position_ids.tolist(), layout.attention_mask[:, 0], strict=True):
        real = [i for i, token in enumerate(row) if token]
        assert [positions[i] for i in real] == [home[row[i]][2] for i in real]
        for i in range(len(row)):
            seen = mask[i].nonzero().flatten().tolist()
            if row[i]:
                assert seen == [j for j in real if may_attend(home[row[i]], home[row[j]])]
            else:
                assert i in seen and not set(seen) & set(real)


@given(trees())
@steady
def test_plain_rows_hold_one_path_each(tree):
    prompts, responses = tree
    batch, home = batch_of(*tree)
    layout = pack(batch, "plain")
    rows = zip(layout.input_ids.tolist(), layout.attention_mask.tolist(), strict=True)
    found = [[t for t, real in zip(row, mask, strict=True) if real] for row, mask in rows]
    alone = [m for m in range(len(prompts)) if m not in [owner for owner, _ in responses]]
    paths = [[t for t in home if home[t][:2] in ((m, -1), (m, n))] for n, (m, _) in enumerate(responses)]
    paths += [[t for t in home if home[t][:2] == (m, -1)] for m in alone]
    assert sorted(found) == sorted(paths)
    for path, positions in zip(layout.input_ids.tolist(), layout.position_ids.tolist(), strict=True):
        assert [p for t, p in zip(path, positions, strict=True) if t] == [home[t][2] for t in path if t]


@given(trees(), st.sampled_from(["trees", "rows", "plain"]))
@steady
def test_states_come_back_to_where_they_belong(tree, form):
    """With the token's id as its state: column 0 is the prompt's last token, column t the response's token t, then its last again."""
    prompts, responses = tree
    batch, home = batch_of(*tree)
    layout = pack(batch, form)
    width = max((length for _, length in responses), default=0)
    states = layout.states(layout.input_ids[:, :, None].float())[:, :, 0].int().tolist() if responses else []
    for n, (m, length) in enumerate(responses):
        last = max(t for t in home if home[t][:2] == (m, -1))
        own = sorted(t for t in home if home[t][1] == n)
        assert states[n] == [last, *own, *[own[-1]] * (width - length)]
    for m, length in enumerate(prompts):
        own = sorted(t for t in home if home[t][:2] == (m, -1))
        assert layout.input_ids.flatten()[layout.prompt_index[m, :length]].tolist() == own


# Masks


@st.composite
def masked(draw, some=True):
    """Numbers (N, R), NaN where the mask is False, and the mask, with at least one True unless `some` is False."""
    n, r = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=r, max_size=r), min_size=n, max_size=n))
    if some and not any(map(any, mask)):
        mask[draw(st.integers(0, n - 1))][draw(st.integers(0, r - 1))] = True
    x = [[draw(NUMBERS) if counts else math.nan for counts in row] for row in mask]
    return torch.tensor(x), torch.tensor(mask)


def counted(x, mask) -> list[float]:
    return [v for row, keep in zip(x.tolist(), mask.tolist(), strict=True) for v, counts in zip(row, keep, strict=True) if counts]


@given(masked(), st.floats(0.5, 50))
@steady
def test_masked_mean_is_the_mean_of_what_counts(given_, count):
    values = counted(*given_)
    assert float(masked_mean(*given_)) == pytest.approx(math.fsum(values) / len(values), rel=1e-4, abs=1e-3)
    assert float(masked_mean(*given_, count=count)) == pytest.approx(math.fsum(values) / count, rel=1e-4, abs=1e-3)


@given(masked(), st.booleans(), st.booleans())
@steady
def test_whiten_is_mean_and_deviation_of_what_counts(given_, keep_mean, unbiased):
    x, mask = given_
    values = counted(x, mask)
    if unbiased and len(values) == 1:
        with pytest.raises(ValueError):
            whiten(x, mask, unbiased=True)
        return
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - unbiased)
    expected = [(v - mean) / math.sqrt(variance + 1e-8) + keep_mean * mean for v in values]
    made = whiten(x, mask, keep_mean=keep_mean, unbiased=unbiased)
    if variance > 1e-3:  # below, float32 cannot tell the values' spread from the rounding of their mean
        assert counted(made, mask) == pytest.approx(expected, rel=1e-3, abs=1e-2)
    assert counted(made, ~mask) == [0.0] * int((~mask).sum())


@given(masked(some=False))
@steady
def test_last_index_is_that_of_the_last_true(given_):
    mask = given_[1]
    rows = mask.tolist()
    empty = [n for n, row in enumerate(rows) if not any(row)]
    if empty:
        with pytest.raises(ValueError, match="rows " + str(empty).replace("[", r"\[").replace("]", r"\]")):
            last_index(mask)
    else:
        assert last_index(mask).tolist() == [max(i for i, counts in enumerate(row) if counts) for row in rows]


@given(masked(some=False))
@steady
def test_through_first_keeps_what_no_hit_stands_before(given_):
    hits = given_[1].tolist()
    assert through_first(given_[1]).tolist() == [[not any(row[:i]) for i in range(len(row))] for row in hits]


# GAE


def errors(rewards: list[float], values: list[float], gamma: float) -> list[float]:
    """delta_t = r_t + gamma V_{t+1} - V_t, V after the end 0."""
    after = [*values[1:], 0.0][: len(values)]
    return [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]


def discounted(x: list[float], rate: float) -> list[float]:
    """sum_l rate^l x_{t+l} for each t."""
    return [math.fsum(rate**k * value for k, value in enumerate(x[t:])) for t in range(len(x))]


def close(expected: list[float]):
    return pytest.approx(expected, rel=1e-4, abs=1e-2)


@st.composite
def rollouts(draw):
    rewards, mask = draw(masked())
    values = torch.where(mask, torch.tensor([[draw(NUMBERS) for _ in range(mask.shape[1])] for _ in range(mask.shape[0])]), math.nan)
    return rewards, values, mask


UNIT = st.floats(0, 1, width=32)


@given(rollouts(), UNIT, UNIT)
@steady
def test_gae_is_the_double_sum(given_, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} (Schulman et al. 2015) over the tokens that count; gaps and batch mates change nothing."""
    rewards, values, mask = given_
    advantages, returns = gae(*given_, gamma=gamma, lam=lam)
    for n in range(len(mask)):
        at = mask[n].nonzero().flatten()
        r, v = rewards[n, at].tolist(), values[n, at].tolist()
        expected = discounted(errors(r, v, gamma), gamma * lam)
        assert advantages[n, at].tolist() == close(expected)
        assert returns[n, at].tolist() == close([a + b for a, b in zip(expected, v, strict=True)])
    assert not advantages[~mask].any() and not returns[~mask].any()


@given(rollouts(), UNIT)
@steady
def test_gae_limits(given_, gamma):
    """lam 0: advantages are the one-step errors. lam 1: returns are the discounted rewards to go, whatever the values."""
    rewards, values, mask = given_
    near, far = gae(*given_, gamma=gamma, lam=0.0)[0], gae(*given_, gamma=gamma, lam=1.0)[1]
    for n in range(len(mask)):
        at = mask[n].nonzero().flatten()
        r, v = rewards[n, at].tolist(), values[n, at].tolist()
        assert near[n, at].tolist() == close(errors(r, v, gamma))
        assert far[n, at].tolist() == close(discounted(r, gamma))
