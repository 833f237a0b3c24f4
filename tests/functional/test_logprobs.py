import math
import weakref

import pytest
import torch

from lit_rlhf.functional import token_entropy, token_logprobs


def identity(x):
    return x


LOGITS = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])  # probabilities 1/4 3/4 and 4/5 1/5


def test_by_hand():
    got = token_logprobs(LOGITS, torch.tensor([1, 1]), identity)
    torch.testing.assert_close(got, torch.tensor([math.log(0.75), math.log(0.2)]))
    # at temperature 1/2 the odds are squared: 1:9 and 16:1
    got = token_logprobs(LOGITS, torch.tensor([1, 1]), identity, temperature=0.5)
    torch.testing.assert_close(got, torch.tensor([math.log(9 / 10), math.log(1 / 17)]))


def test_banned_tokens_have_no_probability_and_the_rest_is_renormalised():
    logits = torch.tensor([[0.0, math.log(3.0), 50.0]], requires_grad=True)
    banned = torch.tensor([False, False, True])
    got = token_logprobs(logits, torch.tensor([1]), identity, banned=banned)
    torch.testing.assert_close(got, torch.tensor([math.log(0.75)]))
    got.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.25, 0.0]]))  # onehot - p
    assert token_logprobs(logits, torch.tensor([2]), identity, banned=banned).item() == -math.inf


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 7, 1024])
def test_chunks_change_neither_values_nor_gradients(chunk_size):
    torch.manual_seed(0)
    states, head, targets = torch.randn(7, 5, requires_grad=True), torch.nn.Linear(5, 11), torch.randint(11, (7,))
    plain = (head(states) / 0.7).log_softmax(-1)[torch.arange(7), targets]
    expected = torch.autograd.grad(plain.square().sum(), [states, head.weight, head.bias])
    got = token_logprobs(states, targets, head, temperature=0.7, chunk_size=chunk_size)
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), [states, head.weight, head.bias]), expected)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(states, targets, head, temperature=0.7, chunk_size=chunk_size), plain.detach())


def test_no_tokens_is_an_empty_result_that_still_belongs_to_the_graph():
    head = torch.nn.Linear(5, 11)
    got = token_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), head)
    assert got.shape == (0,) and got.dtype == torch.float32
    got.sum().backward()  # DDP waits for a gradient of every parameter
    assert head.weight.grad is not None and head.weight.grad.abs().sum() == 0


def test_forward_saves_nothing_of_size_tokens_times_vocabulary():
    tokens, vocabulary, hidden, chunk = 64, 512, 4, 8
    states, head = torch.randn(tokens, hidden, requires_grad=True), torch.nn.Linear(hidden, vocabulary)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = token_logprobs(states, torch.zeros(tokens, dtype=torch.long), head, chunk_size=chunk)
    # states, the head's weight and bias, targets and one total a token; one chunk's logits would be 4096
    assert sum(saved) == tokens * hidden + vocabulary * hidden + vocabulary + 2 * tokens
    out.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_logits_of_one_chunk_live_at_a_time(grad):
    tokens, hidden, chunk = 64, 4, 8
    states, linear = torch.randn(tokens, hidden, requires_grad=True), torch.nn.Linear(hidden, 32)
    alive, sizes, calls, peak = set(), set(), 0, 0

    def head(x):
        nonlocal calls, peak
        logits = linear(x)
        calls += 1
        key = calls
        alive.add(key)
        weakref.finalize(logits, alive.discard, key)
        sizes.add(len(logits))
        peak = max(peak, len(alive))
        return logits

    with torch.set_grad_enabled(grad):
        out = token_logprobs(states, torch.zeros(tokens, dtype=torch.long), head, chunk_size=chunk)
        assert calls == tokens // chunk and sizes == {chunk} and not alive
        if grad:
            out.sum().backward()
            assert calls == 2 * tokens // chunk and not alive  # once more in backward
    assert peak == 1


def test_log_softmax_is_float32_under_autocast_and_for_bfloat16_states():
    states, head = torch.randn(6, 8, requires_grad=True), torch.nn.Linear(8, 16)
    targets, dtypes = torch.arange(6), []

    def seen(x):
        logits = head(x)
        dtypes.append(logits.dtype)
        return logits

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(states, targets, seen, chunk_size=4)
    got.sum().backward()  # outside autocast: the second pass must see the precision of the first
    assert got.dtype == torch.float32 and set(dtypes) == {torch.bfloat16} and len(dtypes) == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(states)
    torch.testing.assert_close(got, logits.float().log_softmax(-1)[torch.arange(6), targets])
    assert token_logprobs(states.bfloat16(), targets, head.bfloat16()).dtype == torch.float32


def test_bad_settings_are_named():
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            token_logprobs(LOGITS, torch.tensor([0, 0]), identity, temperature=temperature)
        with pytest.raises(ValueError, match="temperature"):
            token_entropy(LOGITS, temperature=temperature)
    with pytest.raises(ValueError, match="chunk_size"):
        token_logprobs(LOGITS, torch.tensor([0, 0]), identity, chunk_size=0)


def test_entropy_by_hand():
    assert token_entropy(torch.zeros(2, 3, 4)).shape == (2, 3)
    torch.testing.assert_close(token_entropy(torch.full((4,), 7.0)), torch.tensor(math.log(4)))
    # 1/4 3/4: -(.25 ln .25 + .75 ln .75) = .5623351 ; squared odds 1:9: -(.1 ln .1 + .9 ln .9) = .3250830
    torch.testing.assert_close(token_entropy(LOGITS[0]), torch.tensor(0.5623351))
    torch.testing.assert_close(token_entropy(LOGITS[0], temperature=0.5), torch.tensor(0.3250830))


def test_entropy_with_tokens_of_no_probability():
    logits = torch.tensor([0.0, -torch.inf, 0.0, 5.0], requires_grad=True)
    got = token_entropy(logits, banned=torch.tensor([False, False, False, True]))
    torch.testing.assert_close(got, torch.tensor(math.log(2)))
    got.backward()
    assert logits.grad.isfinite().all()
    assert token_entropy(torch.tensor([0.0, -torch.inf])).item() == 0.0
