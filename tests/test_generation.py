"""Sampling: from the right distribution, with noise that only (key, row, token) decide, ended by EOS and stop strings."""

import pytest
import torch
from families import PACKED, PLAIN, policy_of
from transformers import AutoTokenizer, LlamaForCausalLM

from lit_rlhf.batch import Batch
from lit_rlhf.generation import Sampling, draw, gumbel, sample
from lit_rlhf.networks import CausalPolicy, load_tokenizer

NONE = torch.zeros(6, dtype=torch.bool)


@pytest.fixture(scope="module")
def policy(sft_dir) -> CausalPolicy:
    return CausalPolicy.load(sft_dir)


def prompts(policy, texts=("the cat sat", "a dog", "and then it ate my hat", "rain")) -> Batch:
    return Batch.of([policy.tokenizer(t)["input_ids"] for t in texts], columns={"prompt": list(texts)})


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature):
    """Chi-square with 5 degrees of freedom: 20.5 is exceeded with probability 0.001."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5])
    weights = [pow(2.718281828459045, float(x) / temperature) for x in logits]
    probabilities = torch.tensor([w / sum(weights) for w in weights])
    for key in ((0, 0), (7, 3)):
        token, logprob, entropy = draw(logits.expand(20000, 6), NONE, temperature, key, torch.arange(20000))
        assert chi_square(token.bincount(minlength=6), probabilities) < 20.5
        torch.testing.assert_close(logprob, probabilities.log()[token])
        torch.testing.assert_close(entropy[0], -(probabilities * probabilities.log()).sum())


def test_rows_tokens_and_steps_are_independent():
    """The 6 x 6 joint counts of one draw and the next, over rows and over steps, against the product: 35 degrees, 66.6 at 0.001."""
    flat, rows = torch.zeros(40000, 6), torch.arange(40000)
    first, second = (draw(flat, NONE, 1.0, (0, t), rows)[0] for t in (0, 1))
    for a, b in ((first, second), (first[:-1], first[1:]), (first, draw(flat, NONE, 1.0, (1, 0), rows)[0])):
        assert chi_square((a * 6 + b).bincount(minlength=36), torch.full((36,), 1 / 36)) < 66.6


def test_gumbel_noise_has_gumbels_moments():
    """Mean 0.5772 (Euler's constant), variance pi^2 / 6 = 1.6449; standard errors of 500,000 draws: 0.0018 and 0.005."""
    noise = gumbel((3,), torch.arange(5000, dtype=torch.int32), torch.arange(100))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.008)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.025)


def test_banned_tokens_have_no_probability_and_the_rest_is_renormalised():
    logits, banned = torch.tensor([[5.0, 0.0, 0.0, 9.0, -torch.inf, -torch.inf]]), torch.tensor([True, False, False, True, False, False])
    token, logprob, entropy = draw(logits.expand(4000, 6), banned, 1.0, (0,), torch.arange(4000))
    assert set(token.tolist()) == {1, 2}
    torch.testing.assert_close(logprob, torch.full((4000,), -0.693147))  # two are left, each with probability 1/2
    torch.testing.assert_close(entropy, torch.full((4000,), 0.693147))


def test_greedy_takes_the_likeliest():
    token, logprob, _ = draw(torch.tensor([[0.0, 1.0, 3.0, 2.0, 0.0, 0.0]]), NONE, 0.0, (0,), torch.tensor([0]))
    assert token.tolist() == [2]
    assert float(logprob[0]) == pytest.approx(-0.50234, abs=1e-4)  # 3 - ln(3 + e + e^3 + e^2) = 3 - ln 33.193


def test_the_noise_does_not_depend_on_ranks_batches_or_neighbours(policy):
    sampling, batch = Sampling(max_new_tokens=12, temperature=1.0), prompts(policy)
    whole = sample(policy, batch, sampling, num_responses=3, key=(5, 1))
    for split in ([[0, 1], [2, 3]], [[3, 1, 0, 2]], [[0], [1], [2], [3]]):
        for index in split:
            part = sample(policy, batch.select_prompts(index), sampling, num_responses=3, key=(5, 1), rows=index)
            assert part.texts == [whole.texts[m * 3 + k] for m in index for k in range(3)]
    assert sample(policy, batch, sampling, num_responses=3, key=(5, 2)).texts != whole.texts
    assert len(set(whole.texts)) == 12
    batch.rows = [9, 0, 1, 2]  # the batch's own row numbers are the default
    assert sample(policy, batch, sampling, key=(5, 1)).texts == sample(policy, batch, sampling, key=(5, 1), rows=[9, 0, 1, 2]).texts


def test_greedy_equals_transformers_generate(policy):
    batch = prompts(policy)
    ours = sample(policy, batch, Sampling(max_new_tokens=10, temperature=0.0))
    for n in range(4):
        prompt = batch.prompt_ids[n][batch.prompt_mask[n]][None]
        theirs = policy.lm.generate(prompt, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(prompt))
        assert ours.batch.response_ids[n][ours.batch.response_mask[n]].tolist() == theirs[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_logprobs_are_the_forwards(policy, temperature):
    made = sample(policy, prompts(policy), Sampling(max_new_tokens=16, temperature=temperature), num_responses=4)
    again, _ = policy(made.batch, temperature=temperature, ban=True)
    torch.testing.assert_close(made.logprobs, again, atol=2e-5, rtol=0)
    assert made.finished.any() and not made.finished.all()
    ends = made.batch.response_ids.gather(1, made.batch.response_mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert torch.equal(ends == policy.tokenizer.eos_token_id, made.finished)
    inside = made.batch.response_mask.clone()
    inside.scatter_(1, made.batch.response_mask.sum(1, keepdim=True) - 1, False)
    assert not (made.batch.response_ids[inside] == policy.tokenizer.eos_token_id).any()  # nothing after the first EOS counts
    assert (made.logprobs[~made.batch.response_mask] == 0).all()


@pytest.mark.parametrize("family", [*PACKED, *PLAIN])
def test_the_cache_gives_every_family_the_forwards_logprobs(family, monkeypatch):
    """Sampling pads prompts on the left: neither that nor rows that leave the batch may change anything."""
    policy = policy_of(family)
    monkeypatch.setattr(policy.tokenizer, "batch_decode", lambda rows, **_: [str(r) for r in rows], raising=False)
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[1] *= 2
    batch = Batch.of([[7] * 11, [5, 6], [9, 8, 7, 6, 5]], columns={"prompt": ["a", "b", "c"]})
    made = sample(policy, batch, Sampling(max_new_tokens=14, temperature=1.5), num_responses=2)
    with torch.no_grad():
        torch.testing.assert_close(made.logprobs, policy(made.batch, temperature=1.5, ban=True)[0], atol=5e-5, rtol=0)


def test_stop_strings_end_a_response_and_are_cut_from_its_text(policy):
    sampling = Sampling(max_new_tokens=40, temperature=1.0)
    free = sample(policy, prompts(policy), sampling, num_responses=4)
    letter = max("aeiost", key=lambda c: sum(c in t for t in free.texts))
    stopped = sample(policy, prompts(policy), Sampling(max_new_tokens=40, temperature=1.0, stop=[letter]), num_responses=4)
    assert any(letter in t for t in free.texts)
    assert stopped.texts == [t.split(letter)[0] for t in free.texts]
    for text, full, finished in zip(stopped.texts, free.texts, stopped.finished.tolist(), strict=True):
        assert finished or (text == full and letter not in full)
    kept = stopped.batch.response_mask.sum(1)
    assert (kept <= free.batch.response_mask.sum(1)).all() and (kept < free.batch.response_mask.sum(1)).any()


def test_pad_and_ids_without_a_token_are_never_sampled(sft_dir, tokenizer):
    """A table with 40 rows more than the tokenizer has ids, and a policy that loves them and the pad token."""
    lm = LlamaForCausalLM.from_pretrained(sft_dir)
    lm.resize_token_embeddings(len(tokenizer) + 40, mean_resizing=False)
    with torch.no_grad():
        lm.lm_head.weight[len(tokenizer) :] = 0
        lm.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer) + 40))
        lm.lm_head.bias[len(tokenizer) :] = 20.0
        lm.lm_head.bias[tokenizer.pad_token_id] = 20.0
    policy = CausalPolicy(lm, tokenizer)
    made = sample(policy, prompts(policy), Sampling(max_new_tokens=16, temperature=1.0), num_responses=4)
    ids = made.batch.response_ids[made.batch.response_mask]
    assert int(ids.max()) < len(tokenizer) and not (ids == tokenizer.pad_token_id).any()
    torch.testing.assert_close(made.logprobs, policy(made.batch, ban=True)[0], atol=2e-5, rtol=0)
    assert (policy(made.batch)[0][made.batch.response_mask] < made.logprobs[made.batch.response_mask] - 1).all()  # without the ban


def test_a_policy_that_samples_special_tokens(policy):
    """<extra> (id 2) is a token like any other for the masks, and no text."""
    batch = prompts(policy)
    odd = policy.tokenizer("<extra>")["input_ids"]
    assert odd == [2]
    made = batch.with_responses(torch.tensor([[2, 2, 1]] * 4), torch.ones(4, 3, dtype=torch.bool), torch.arange(4))
    from lit_rlhf.generation import response_texts

    assert response_texts(policy.tokenizer, made) == [""] * 4
    assert (policy(made, ban=True)[0] < 0).all()


@pytest.mark.parametrize("how", ["equal", "missing", "no special left"])
def test_pad_is_never_eos(tmp_path, tokenizer, sft_dir, how):
    other = AutoTokenizer.from_pretrained(sft_dir)
    other.pad_token = {"equal": "<eos>", "missing": None, "no special left": "<eos>"}[how]
    if how == "no special left":
        other.add_special_tokens({"bos_token": "<pad>", "sep_token": "<extra>"})
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    assert loaded.pad_token == ("<|pad|>" if how == "no special left" else "<pad>" if how == "missing" else loaded.pad_token)
    assert loaded.pad_token in ("<pad>", "<extra>", "<|pad|>")


def test_an_added_pad_token_makes_one_row_of_room(tmp_path, sft_dir):
    other = AutoTokenizer.from_pretrained(sft_dir)
    other.add_special_tokens({"bos_token": "<pad>", "sep_token": "<extra>", "pad_token": "<eos>"})
    lm = LlamaForCausalLM.from_pretrained(sft_dir)
    lm.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    policy = CausalPolicy.load(str(tmp_path))
    assert policy.tokenizer.pad_token_id == 300 == policy.lm.get_input_embeddings().weight.shape[0] - 1
    made = sample(policy, prompts(policy), Sampling(max_new_tokens=8, temperature=1.0))
    assert int(made.batch.response_ids.max()) < 300


def test_beyond_the_context_is_an_error(policy):
    with pytest.raises(
        ValueError, match=r"prompt of 6 tokens \+ max_new_tokens 91 exceed the model's context of 96; set max_prompt_tokens to at most 5"
    ):
        sample(policy, Batch.of([[5] * 6, [5]]), Sampling(max_new_tokens=91))


@pytest.mark.parametrize("bad, said", [({"max_new_tokens": 0}, "at least 1, got 0"), ({"temperature": -1.0}, "got -1")])
def test_bad_sampling_settings(bad, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**bad)
