"""ILQL: its parts are what plain matrix products give, it learns which response pays, and its export samples as it does."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_rlhf import ILQL, Sampling, Schedule, SFTDataModule, rewarded_rows
from lit_rlhf.callbacks import ExportHF
from lit_rlhf.data.collate import collate
from lit_rlhf.generation import sample
from lit_rlhf.q_values import FILE, QPolicy
from lit_rlhf.scoring import text_batch

PROMPTS, RESPONSES = ["the cat", "the cat", "my dog ran far"], [" sat", " ran far away into rain", " ate"]
SHORT = Sampling(max_new_tokens=6, temperature=1.0)


@pytest.fixture
def rows(sft_rows) -> list[dict]:
    """Each prompt with a response that pays and one that does not."""
    return [
        {"prompt": row["prompt"], "response": r, "reward": pay} for row in sft_rows[:8] for r, pay in ((" the hat", 1.0), (" a mat", 0.0))
    ]


@pytest.fixture
def fit(make_trainer, sft_dir, rows):
    def run(settings=None, data=None, model=None, **kwargs):
        usual = {"optimizer": lambda p: torch.optim.AdamW(p, lr=5e-3), "scheduler": Schedule("constant"), "sampling": SHORT, "top_k": None}
        module = ILQL(model or sft_dir, **(usual | (settings or {})))
        losses = []
        module.log_dict = lambda found, **_: losses.append({k: float(v) for k, v in found.items()})
        trainer = make_trainer(**({"max_steps": 3} | kwargs))
        trainer.fit(module, datamodule=SFTDataModule(rows, **({"batch_size": 8} | (data or {}))))
        return module, [line for line in losses if "train/loss" in line]

    return run


def test_the_parts_are_those_of_plain_transformers(sft_dir):
    torch.manual_seed(3)
    network = QPolicy.load(sft_dir)
    with torch.no_grad():
        network.heads.follow(1.0)
        for p in network.heads.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that the target heads are not the Q heads
        batch = text_batch(network.tokenizer, PROMPTS, RESPONSES)
        found = network(batch)
        lm = AutoModelForCausalLM.from_pretrained(sft_dir)
        for n in range(3):
            prompt = batch.prompt_ids[batch.prompt_of[n]][batch.prompt_mask[batch.prompt_of[n]]]
            ids = batch.response_ids[n][batch.response_mask[n]]
            out = lm(input_ids=torch.cat([prompt, ids])[None], output_hidden_states=True)
            states, size = out.hidden_states[-1][0, len(prompt) - 1 :], len(ids)
            take = lambda x, ids=ids: x[torch.arange(len(ids)), ids]  # noqa: E731
            close = lambda a, b: torch.testing.assert_close(a, b, atol=2e-5, rtol=0)  # noqa: E731
            close(found.logprobs[n, :size], take(out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)))
            for i in range(2):
                head, target = network.heads.q[i], network.heads.targets[i]
                q = head.inner(states[:-1]).clamp(min=0) @ head.out.weight.T + head.out.bias
                close(found.q[i, n, :size], take(q))
                close(found.q_logprobs[i, n, :size], take(q.log_softmax(-1)))
                close(
                    found.target_q[i, n, :size],
                    take((states[:-1] @ target.inner.weight.T + target.inner.bias).relu() @ target.out.weight.T + target.out.bias),
                )
            close(found.values[n, : size + 1], network.heads.v(states).squeeze(-1))
        assert (found.q - found.target_q).abs().max() > 0.01


def test_guided_log_probs_and_samples_are_of_one_distribution(sft_dir):
    """softmax(log p + beta (min Q - V)) over the top k, by hand; the sampler saw the same log-probs."""
    torch.manual_seed(3)
    network = QPolicy.load(sft_dir).eval()
    batch = text_batch(network.tokenizer, PROMPTS, RESPONSES)
    with torch.no_grad():
        plain = network.policy(batch)[0]
        lm = AutoModelForCausalLM.from_pretrained(sft_dir)
        prompt, first = batch.prompt_ids[0][batch.prompt_mask[0]], int(batch.response_ids[0, 0])
        out = lm(input_ids=prompt[None], output_hidden_states=True)
        state = out.hidden_states[-1][0, -1]
        gain = torch.minimum(network.heads.targets[0](state), network.heads.targets[1](state)) - network.heads.v(state)
        wanted = (out.logits[0, -1].log_softmax(-1) + 2.0 * gain).log_softmax(-1)
        with network.guided(2.0) as policy:
            torch.testing.assert_close(policy(batch)[0][0, 0], wanted[first], atol=2e-5, rtol=0)
        best = wanted.topk(5).indices.tolist()
        with network.guided(2.0, top_k=5) as policy:
            made = sample(policy, batch, SHORT, num_responses=20)
            again = policy(made.batch, ban=True)[0]
            torch.testing.assert_close(again, made.logprobs, atol=1e-4, rtol=0)
            assert set(made.batch.response_ids[made.batch.prompt_of == 0, 0].tolist()) <= set(best)
        torch.testing.assert_close(network.policy(batch)[0], plain, atol=0, rtol=0)  # the head is its own again


def test_it_learns_what_pays_and_accumulation_changes_nothing(fit, sft_rows):
    module, losses = fit({"target_rate": 0.1, "target_every": 1, "reward_fn": lambda p, r: [float("hat" in x) for x in r]}, max_steps=60)
    assert losses[-1]["train/q_loss"] < losses[0]["train/q_loss"] / 3 and losses[-1]["train/awac_loss"] < losses[0]["train/awac_loss"] / 3
    batch = text_batch(module.tokenizer, [sft_rows[0]["prompt"]] * 2, [" the hat", " a mat"])
    module.network.eval()

    def lead(beta):
        with torch.no_grad(), module.network.guided(beta) as policy:
            pays, other = policy(batch)[0].sum(1).tolist()
        return pays - other

    assert abs(lead(0.0)) < 1.0 and lead(4.0) > lead(0.0) + 2.0
    one, first = fit({"target_every": 1}, max_steps=2)
    two, second = fit({"target_every": 1}, max_steps=2, accumulate_grad_batches=4)
    assert second[1] == pytest.approx(first[1], abs=1e-4)
    for (name, a), b in zip(one.network.state_dict().items(), two.network.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=name)


def test_the_targets_move_every_so_many_steps(fit, monkeypatch):
    moved = []
    monkeypatch.setattr("lit_rlhf.q_values.QHeads.follow", lambda self, rate: moved.append(rate))
    fit({"target_rate": 0.5, "target_every": 2}, max_steps=5)
    assert moved == [0.5, 0.5]


CHANGES = [{"gamma": 0.5}, {"tau": 0.9}, {"cql_coef": 1.0}, {"awac_coef": 0.1}, {"awac_beta": 1.0}]


def test_every_argument_of_the_loss_counts(fit):
    base = fit(max_steps=2)[1][-1]["train/loss"]
    for change in CHANGES:
        assert fit(change, max_steps=2)[1][-1]["train/loss"] != base, change


def test_rewards_are_standardised_over_the_training_rows(fit, rows):
    """8 rewards of 1 and 8 of 0: mean 0.5, variance 16 * 0.25 / 15. Any other scale of the rewards gives the same losses."""
    module, losses = fit()
    assert module.moments == pytest.approx((0.5, (4 / 15) ** 0.5))
    for row in rows:
        row["reward"] = 7 + 100 * row["reward"]
    assert fit()[1] == [pytest.approx(line, rel=1e-4, abs=1e-5) for line in losses]
    rows[3]["reward"] = None
    with pytest.raises(ValueError, match='row 4 .*"reward" is None; each row needs a finite number'):
        fit()


def test_texts_with_rewards(tokenizer, fit, make_trainer, sft_dir):
    """trlX's second example; <eos> is what this tokenizer's generation begins with."""
    rows = rewarded_rows(["dolphins", ("the", " geese")], [1, 100.0], tokenizer)
    assert rows == [{"prompt": "<eos>", "response": "dolphins", "reward": 1.0}, {"prompt": "the", "response": " geese", "reward": 100.0}]
    with pytest.raises(ValueError, match="1 samples and 2 rewards"):
        rewarded_rows(["a"], [1, 2], tokenizer)
    module = ILQL(sft_dir, sampling=SHORT)
    data = SFTDataModule(rows, batch_size=2)
    make_trainer(max_steps=1).fit(module, datamodule=data)
    assert collate(data.tables["train"].fetch([0])).prompt_ids.tolist() == [[tokenizer.eos_token_id]]


def test_the_export_samples_as_the_module_does(fit, sft_rows, make_trainer, sft_dir, tmp_path):
    data = [row | {"reward": 0.0} for row in sft_rows[:4]]
    module, _ = fit(max_steps=4, callbacks=[ExportHF(str(tmp_path / "hf"))], data={"val_data": data})
    with pytest.raises(ValueError, match='"reward" is None'):
        make_trainer().validate(module, SFTDataModule(sft_rows, val_data=sft_rows[:4]))
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")  # a plain directory to everyone else

    def predict(model, **settings):
        made = make_trainer().predict(ILQL(str(model), sampling=SHORT, **settings), datamodule=SFTDataModule(sft_rows, test_data=data))
        return [row["response"] for part in made for row in part]

    with torch.no_grad(), module.network.eval().guided(1.0, 20) as policy:
        batch = text_batch(module.tokenizer, PROMPTS, RESPONSES)
        mine = policy(batch)[0]
    with torch.no_grad(), QPolicy.load(str(tmp_path / "hf")).eval().guided(1.0, 20) as policy:
        torch.testing.assert_close(policy(batch)[0], mine, atol=1e-6, rtol=0)
    assert predict(tmp_path / "hf") == predict(tmp_path / "hf") != predict(tmp_path / "hf", beta=50.0)


def test_heads_of_another_model_are_refused(sft_dir, tmp_path):
    QPolicy.load(sft_dir).save(tmp_path / "hf")
    heads = load_file(tmp_path / "hf" / FILE)
    save_file({name: x[..., :3].contiguous() for name, x in heads.items()}, tmp_path / "hf" / FILE)
    with pytest.raises(ValueError, match="q_values.safetensors does not belong to the model beside it"):
        QPolicy.load(str(tmp_path / "hf"))


def test_refuses(sft_dir, reward_dir):
    for wrong in ({"tau": 1.0}, {"target_rate": 0.0}, {"target_every": 0}, {"top_k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ILQL(sft_dir, **wrong)
