"""collect() and shape(): the maths of an iteration by hand, and what may not change a response's numbers."""

import math

import pytest
import torch

from lit_rlhf.batch import Batch
from lit_rlhf.generation import Sampling
from lit_rlhf.networks import CausalPolicy, ScalarModel, in_parts, score_of
from lit_rlhf.rollout import Actors, Rollout, RunningMoments, Shaping, collect, join_rollouts, shape
from lit_rlhf.scoring import FunctionScorer, ModelScorer


def fake(**changes) -> Rollout:
    """Two responses, of 3 and 2 tokens; garbage outside the mask."""
    batch = Batch.of([[5], [6]], [[7, 8, 1], [9, 9]], columns={"prompt": ["a", "b"]})
    numbers = {
        "finished": torch.tensor([True, False]),
        "logprobs": torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -3.0, 99.0]]),
        "sampled_logprobs": torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -3.25, 99.0]]),
        "ref_logprobs": torch.tensor([[-2.0, -2.0, -1.5], [-3.0, -2.0, -99.0]]),
        "values": torch.tensor([[0.5, 0.25, 1.0], [-1.0, 0.5, 77.0]]),
        "entropy": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]),
        "scores": torch.tensor([3.0, 5.0]),
    }
    return Rollout(batch, ["x", "y"], **(numbers | changes))


def test_an_iteration_by_hand():
    """kl_coef 0.1, gamma 1, lam 0.5, no EOS in the second response, whose score 5 becomes -1.

    log p - log q:    [1, 0, 1]              [2, -1]             KL of a response: 2 and 1, their mean 1.5
    rewards:          [-.1, 0, -.1 + 3]      [-.2, .1 - 1]     = [-.1, 0, 2.9] and [-.2, -.9], sums 2.8 and -1.1
    delta_t = r_t + V_t+1 - V_t:  [-.1 + .25 - .5, 0 + 1 - .25, 2.9 - 1] = [-.35, .75, 1.9]; [-.2 + .5 + 1, -.9 - .5] = [1.3, -1.4]
    A = delta + .5 A_t+1:         [-.35 + .5 * 1.7, .75 + .5 * 1.9, 1.9] = [.5, 1.7, 1.9];   [1.3 - .7, -1.4] = [.6, -1.4]
    returns A + V:                [1.0, 1.95, 2.9]; [-.4, -.9]
    """
    experience, stats = shape(fake(), 0.1, Shaping(no_eos_score=-1.0, whiten_advantages=False, lam=0.5))
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(experience.rewards, torch.tensor([[-0.1, 0.0, 2.9], [-0.2, -0.9, 0.0]]), **close)
    torch.testing.assert_close(experience.advantages, torch.tensor([[0.5, 1.7, 1.9], [0.6, -1.4, 0.0]]), **close)
    torch.testing.assert_close(experience.returns, torch.tensor([[1.0, 1.95, 2.9], [-0.4, -0.9, 0.0]]), **close)
    assert experience.scores.tolist() == [3.0, -1.0]
    # R - V = A: mean .66, variance 6.892 / 5 = 1.3784; R: mean .91, variance (.0081 + 1.0816 + 3.9601 + 1.7161 + 3.2761) / 5 = 2.0084
    wanted = {"score": 4.0, "score_std": 1.0, "shaped_score": 1.0, "kl": 1.5, "reward": 0.85}
    wanted |= {"length": 2.5, "eos_rate": 0.5, "entropy": 3.0, "value": 0.25, "sampling_gap_max": 0.25}
    wanted |= {"advantage_std": math.sqrt(1.3784), "explained_variance": 1 - 1.3784 / 2.0084}
    assert {name: float(stats[name]) for name in wanted} == pytest.approx(wanted, abs=1e-5)


def test_centred_values_by_hand():
    """Rewards to come: [2.8, 2.9, 2.9] and [-1.1, -.9], mean 1.32; values: mean .25. So 1.07 is added to each value."""
    experience, stats = shape(fake(), 0.1, Shaping(no_eos_score=-1.0), center_values=True)
    assert float(stats["value_offset"]) == pytest.approx(-1.07, abs=1e-5)
    assert experience.values[experience.batch.response_mask].tolist() == pytest.approx([1.57, 1.32, 2.07, 0.07, 1.57], abs=1e-5)


def test_whitening_by_hand():
    """Advantages .5, 1.7, 1.9, .6, -1.4: mean .66, variance (.0256 + 1.0816 + 1.5376 + .0036 + 4.2436) / 5 = 1.3784; returns stay."""
    experience, _ = shape(fake(), 0.1, Shaping(no_eos_score=-1.0, lam=0.5))
    wanted = [(a - 0.66) / math.sqrt(1.3784) for a in (0.5, 1.7, 1.9, 0.6, -1.4)]
    assert experience.advantages[experience.batch.response_mask].tolist() == pytest.approx(wanted, abs=1e-5)
    assert experience.returns[0].tolist() == pytest.approx([1.0, 1.95, 2.9], abs=1e-6)


def test_reward_whitening_keeps_the_mean():
    """Rewards -.1, 0, 2.9, -.2, -.9: mean .34, variance (.1936 + .1156 + 6.5536 + .2916 + 1.5376) / 5 = 1.7384."""
    experience, _ = shape(fake(), 0.1, Shaping(no_eos_score=-1.0, whiten_rewards=True, whiten_advantages=False))
    wanted = [(r - 0.34) / math.sqrt(1.7384) + 0.34 for r in (-0.1, 0.0, 2.9, -0.2, -0.9)]
    assert experience.rewards[experience.batch.response_mask].tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_order_of_rules_for_scores():
    """No-EOS score first, then the clip, then the scale: scores 3, 5 -> 3, -9 -> 2, -2 -> divided by their std of 2 -> 1, -1."""
    moments = RunningMoments()
    experience, stats = shape(fake(), 0.0, Shaping(no_eos_score=-9.0, score_clip=2.0), moments)
    assert experience.scores.tolist() == pytest.approx([1.0, -1.0])
    assert float(stats["score"]) == 4.0  # what is logged as the score is the scorer's
    assert shape(fake(), 0.0, Shaping(score_clip=2.5))[0].scores.tolist() == [2.5, 2.5]
    assert shape(fake(), 0.0, Shaping())[0].scores.tolist() == [3.0, 5.0]


def test_running_moments_are_those_of_all_scores_so_far():
    """1, 3 then 2, 6, 8: mean 4, variance (9 + 1 + 4 + 4 + 16) / 5 = 6.8."""
    moments = RunningMoments()
    assert moments(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([1.0, 3.0])  # std 1
    assert moments(torch.tensor([2.0, 6.0, 8.0])).tolist() == pytest.approx([x / math.sqrt(6.8) for x in (2, 6, 8)])
    assert moments.mean == pytest.approx(4.0)


@pytest.fixture(scope="module")
def actors(sft_dir, reward_dir) -> Actors:
    scorer = ModelScorer(ScalarModel.load(reward_dir))
    return Actors(CausalPolicy.load(sft_dir), CausalPolicy.load(sft_dir), ScalarModel.load(reward_dir), scorer)


def prompts(actors, texts) -> Batch:
    return Batch.of([actors.policy.tokenizer(t)["input_ids"] for t in texts], columns={"prompt": list(texts)})


TEXTS = ["the cat sat", "a dog", "and then it ate my hat", "rain"]


def test_batch_mates_change_nothing(actors):
    """One prompt alone, and among longer ones with longer responses: log-probs, values, score, rewards and returns are the same."""
    sampling, key = Sampling(12, 1.0), (1, 2)
    whole = collect(actors, prompts(actors, TEXTS), sampling, num_responses=2, key=key)
    plain = Shaping(whiten_advantages=False, no_eos_score=-1.0)
    among = shape(whole, 0.3, plain)[0]
    for m, text in enumerate(TEXTS):
        alone = collect(actors, prompts(actors, [text]), sampling, num_responses=2, key=key, rows=[m])
        one, rows = shape(alone, 0.3, plain)[0], [2 * m, 2 * m + 1]
        picked = among.select(rows)
        assert alone.texts == [whole.texts[n] for n in rows]
        torch.testing.assert_close(one.scores, picked.scores, atol=1e-5, rtol=0)
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            torch.testing.assert_close(getattr(one, name), getattr(picked, name), atol=2e-5, rtol=0)


def test_text_after_eos_and_padding_change_nothing(actors):
    """Ids outside the masks may be anything, and the padding any width."""
    clean = Batch.of([[5, 6, 7], [8]], [[9, 1], [10, 11, 12, 1]], columns={"prompt": ["a", "b"]})
    dirty = Batch.of([[5, 6, 7], [8]], [[9, 1], [10, 11, 12, 1]], columns={"prompt": ["a", "b"]})
    for name in ("prompt", "response"):
        ids, mask = getattr(dirty, f"{name}_ids"), getattr(dirty, f"{name}_mask")
        ids = torch.nn.functional.pad(torch.where(mask, ids, 1), (0, 3), value=44)
        setattr(dirty, f"{name}_ids", ids)
        setattr(dirty, f"{name}_mask", torch.nn.functional.pad(mask, (0, 3)))
    mask = clean.response_mask
    with torch.no_grad():
        torch.testing.assert_close(actors.policy(dirty)[0][:, :4], actors.policy(clean)[0], atol=1e-6, rtol=0)
        values = [actors.value(b) for b in (dirty, clean)]
    torch.testing.assert_close(values[0][:, :4][mask], values[1][:, :4][mask], atol=1e-6, rtol=0)
    torch.testing.assert_close(score_of(values[0], dirty.response_mask), score_of(values[1], mask), atol=1e-6, rtol=0)


def test_left_pads_in_plain_transformers_give_our_numbers(actors):
    """The usual way of others: prompts padded on the left, one text a row, positions from the mask."""
    texts = [([5, 6, 7, 8, 9], [10, 1]), ([11], [12, 13, 1])]
    ids = torch.zeros(2, 8, dtype=torch.long)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    for n, (prompt, response) in enumerate(texts):
        ids[n, 5 - len(prompt) : 5 + len(response)] = torch.tensor(prompt + response)
        mask[n, 5 - len(prompt) : 5 + len(response)] = True
    position = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = actors.policy.lm(input_ids=ids, attention_mask=mask.long(), position_ids=position).logits.log_softmax(-1)
        ours = actors.policy(Batch.of([p for p, _ in texts], [r for _, r in texts]))[0]
    for n, (_, response) in enumerate(texts):
        wanted = logits[n, torch.arange(len(response)) + 4, torch.tensor(response)]
        torch.testing.assert_close(ours[n, : len(response)], wanted, atol=1e-5, rtol=0)


def test_passes_of_few_tokens_give_the_same(actors):
    whole = collect(actors, prompts(actors, TEXTS), Sampling(10, 1.0), num_responses=2)
    parts = collect(actors, prompts(actors, TEXTS), Sampling(10, 1.0), num_responses=2, tokens_per_forward=1)
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=0)
    assert parts.texts == whole.texts


def test_join_keeps_the_order(actors):
    halves = [collect(actors, prompts(actors, TEXTS[i : i + 2]), Sampling(10, 1.0), rows=[i, i + 1]) for i in (0, 2)]
    whole, joined = collect(actors, prompts(actors, TEXTS), Sampling(10, 1.0)), join_rollouts(halves)
    assert joined.texts == whole.texts and joined.batch.columns == whole.batch.columns
    torch.testing.assert_close(joined.values, whole.values, atol=1e-5, rtol=0)


def test_a_reference_is_scored_as_reward_training_read_it(actors):
    """After "TL;DR:" a response begins with one space, in the data's reference column it does not."""
    seen = []
    scorer = FunctionScorer(lambda p, r: seen.append(list(r)) or [1.0] * len(r))
    batch = prompts(actors, ["POST: x\n\nTL;DR:", "the cat"])
    batch.columns["reference"] = ["ran away", "sat"]
    collect(Actors(actors.policy, actors.reference, None, scorer), batch, Sampling(3), subtract_reference=True)
    assert seen[1] == [" ran away", "sat"]
    with pytest.raises(ValueError, match="no reference; give data with a label"):
        collect(Actors(actors.policy, None, None, scorer), prompts(actors, ["a"]), Sampling(3), subtract_reference=True)


def test_in_parts_of_shuffled_rows():
    batch = Batch.of([[1], [2, 2], [3]], [[4], [5, 6], [7], [8, 8, 8]], [2, 0, 1, 0])
    net = torch.nn.Module()
    found = in_parts(net, batch, 1, lambda part: part.response_ids.float())
    assert found.tolist() == [[4, 0, 0], [5, 6, 0], [7, 0, 0], [8, 8, 8]]
