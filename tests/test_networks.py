"""Packed rows, plain rows and plain transformers give the same numbers, for every family; loading, saving, tokenizers and LoRA."""

import warnings

import pytest
import torch
from families import PACKED, PLAIN, SCALED, WINDOW, gradients, policy_of, scalar_of, true_logprobs, true_scalars

from lit_rlhf.batch import Batch
from lit_rlhf.networks import score_of

TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\nlargest difference from one text at a time in plain transformers (float32)")
    print(f"{'family':16}{'rows':8}{'log-probs':>11}{'their grad':>11}{'values':>11}{'score':>11}{'their grad':>11}{'largest grad':>14}")
    print("\n".join(TABLE))


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(2, 100, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(12, 1), ids(5, 2), ids(9, 3), ids(1, 4)]
RESPONSES = [ids(7, 5), ids(3, 6), ids(9, 7), ids(1, 8), ids(6, 9)]
OWNER = [0, 0, 1, 2, 3]


def batch() -> Batch:
    return Batch.of(PROMPTS, RESPONSES, OWNER)


def largest(ours: torch.Tensor, theirs: list[torch.Tensor]) -> float:
    return max(float((ours[n, : len(row)] - row).abs().max()) for n, row in enumerate(theirs))


def apart(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def weights(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Fixed random factors, so that no part of a gradient cancels."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(len(row), generator=draw) for row in rows]


def compare(net, forward, truth) -> tuple[float, float, float]:
    """Largest difference of the outputs and of the gradients of a weighted mean, and the largest gradient."""
    model = net.lm if hasattr(net, "lm") else net.model
    with gradients(model) as ours:
        found = forward()
        factors = weights(truth())
        (sum((found[n, : len(w)] * w).sum() for n, w in enumerate(factors)) / 20).backward()
    with gradients(model) as theirs:
        rows = truth()
        (sum((row * w).sum() for row, w in zip(rows, factors, strict=True)) / 20).backward()
    return largest(found.detach(), [r.detach() for r in rows]), apart(ours, theirs), max(float(g.abs().max()) for g in theirs.values())


def check(family: str) -> tuple:
    """Both networks of a family against plain transformers; adds a line to the table."""
    policy, network = policy_of(family), scalar_of(family)
    texts = [(PROMPTS[m], r) for m, r in zip(OWNER, RESPONSES, strict=True)]
    logprobs = compare(policy, lambda: policy(batch())[0], lambda: [true_logprobs(policy.lm, p, r) for p, r in texts])
    values = compare(network, lambda: network(batch()), lambda: [true_scalars(network.model, p, r) for p, r in texts])
    with torch.no_grad():
        scores = score_of(network(batch()), batch().response_mask)
        own = torch.cat([network.model(input_ids=torch.tensor([p + r])).logits[0] for p, r in texts])
    figures = (logprobs[0], logprobs[1], values[0], float((scores - own).abs().max()), values[1])
    rows = policy.form_for(batch())
    TABLE.append(f"{family:16}{rows:8}" + "".join(f"{x:11.1e}" for x in figures) + f"{max(logprobs[2], values[2]):14.2f}")
    return policy, network, figures


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_equal_separate_rows(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy, network, figures = check(family)
    own_attention = family == "falcon"  # computes it itself, where transformers does not ask for another function
    assert policy.form == network.form == policy.form_for(batch()) == ("rows" if own_attention else "trees")
    assert max(figures) < 1e-4


@pytest.mark.parametrize("family", PLAIN)
def test_other_families_take_plain_rows(family):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = policy_of(family)
    said = [str(w.message) for w in caught if "plain rows" in str(w.message)]
    windowed = family in ("mistral-window", "gemma3_text")  # packed while a path is not longer than the window
    assert len(said) == (0 if windowed else 1) and (policy.form != "plain") == windowed
    assert policy.form_for(batch()) == "plain"
    if windowed:
        short = Batch.of([ids(3, 1), ids(4, 2)], [ids(WINDOW - 3, 3), ids(2, 4)])
        assert policy.form_for(short) == policy.form
        for n, row in enumerate(short.response_ids):
            prompt, response = (x[m].tolist() for x, m in ((short.prompt_ids[n], short.prompt_mask[n]), (row, short.response_mask[n])))
            torch.testing.assert_close(policy(short)[0][n, : len(response)], true_logprobs(policy.lm, prompt, response), atol=1e-5, rtol=0)
    assert max(check(family)[2]) < 1e-4


@pytest.mark.parametrize("family", SCALED)
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_scaled_and_capped_logits(family, scale):
    policy = policy_of(family, scale)
    assert policy.own_logits
    found = policy(batch())[0]
    for n, (m, response) in enumerate(zip(OWNER, RESPONSES, strict=True)):
        torch.testing.assert_close(found[n, : len(response)], true_logprobs(policy.lm, PROMPTS[m], response), atol=1e-4, rtol=0)
