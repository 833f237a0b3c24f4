"""Quark: its tokens stand where they should and are never sampled, its loss is plain transformers', and the best token comes to mean it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_rlhf import PromptDataModule, Quark, Sampling, Schedule
from lit_rlhf.batch import Batch
from lit_rlhf.callbacks import ExportHF
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.quantile_tokens import add_quantile_tokens, conditioned, one_each, with_tokens


def vowels(prompts, responses):
    return [10 * sum(c in "ae" for c in r) / (len(r) + 1) for r in responses]


def brief(prompts, responses):
    """Easily learnt: end early."""
    return [-float(len(r)) for r in responses]


class Recorded(Quark):
    """Keeps what each iteration learns from, and every number."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn, self.rollouts, self.updates = [], [], []

    def log_dict(self, metrics, *args, **kwargs):
        numbers = {name: float(x) for name, x in metrics.items()}
        if "rollout/score" in numbers:
            self.drawn.append(self.experience)
            self.rollouts.append(numbers)
        if "train/loss" in numbers:
            self.updates.append(numbers)
        super().log_dict(metrics, *args, **kwargs)


@pytest.fixture
def fit(make_trainer, sft_dir, sft_rows):
    def run(settings=None, data=None, model=None, **kwargs):
        usual = {
            "reward_fn": vowels,
            "num_quantiles": 3,
            "num_prompts": 8,
            "minibatch_size": 8,
            "minibatches": 4,
            "sampling": Sampling(8, 1.0),
        }
        usual |= {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2), "scheduler": Schedule("constant")}
        module = Recorded(model or sft_dir, **(usual | (settings or {})))
        trainer = make_trainer(**({"max_epochs": 2} | kwargs))
        trainer.fit(module, datamodule=PromptDataModule(sft_rows, **({"max_prompt_tokens": 64, "val_batch_size": 4} | (data or {}))))
        return module

    return run


def test_the_token_stands_first_or_after_bos():
    batch = Batch.of([[7, 8, 9], [5], [7]], [[1]] * 3)
    found = conditioned(batch, torch.tensor([20, 21, 22]), bos=7)
    rows = [ids[kept].tolist() for ids, kept in zip(found.prompt_ids, found.prompt_mask, strict=True)]
    assert rows == [[7, 20, 8, 9], [21, 5], [7, 22]]
    assert conditioned(batch, torch.tensor([20, 21, 22]), bos=None).prompt_ids[:, 0].tolist() == [20, 21, 22]
    twice = one_each(Batch.of([[7, 8], [5]], [[1], [2], [3]], [0, 0, 1]))
    assert twice.prompt_ids.tolist() == [[7, 8], [7, 8], [5, 0]] and twice.prompt_of.tolist() == [0, 1, 2]


def test_the_tokenizer_gets_the_tokens_once(sft_dir):
    tokenizer = AutoTokenizer.from_pretrained(sft_dir)
    size = len(tokenizer)
    assert add_quantile_tokens(tokenizer, 3) == [size, size + 1, size + 2] == add_quantile_tokens(tokenizer, 3)
    assert tokenizer("<|quantile_2|>the")["input_ids"][0] == size + 2
    for k in (2, 4):
        with pytest.raises(ValueError, match="has 3 quantile tokens; give num_quantiles: 3"):
            add_quantile_tokens(tokenizer, k)


def test_tied_tables_grow_together_and_are_loaded_again(tokenizer, tmp_path):
    """One table for input and output, as in most small models; its new rows are drawn like the old ones."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    lm = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "lm")
    own = AutoTokenizer.from_pretrained(tmp_path / "lm")
    ids = add_quantile_tokens(own, 3)
    policy = with_tokens(CausalPolicy.load(str(tmp_path / "lm")), own, ids)
    table = policy.lm.get_input_embeddings().weight
    assert table is policy.lm.get_output_embeddings().weight and len(table) == len(tokenizer) + 3
    torch.testing.assert_close(table[:-3], lm.model.embed_tokens.weight, atol=0, rtol=0)
    assert 0.5 < float(table[-3:].std() / table[:-3].std()) < 2 and policy.banned[ids].all()
    policy.save(tmp_path / "hf")
    batch = conditioned(Batch.of([[7, 8, 9]], [[5, 6, 1]]), torch.tensor(ids[2:]), None)
    with torch.no_grad():
        torch.testing.assert_close(CausalPolicy.load(str(tmp_path / "hf"))(batch)[0], policy(batch)[0], atol=1e-6, rtol=0)


def test_the_first_loss_by_plain_transformers(fit, sft_dir):
    """Exact KL and entropy over the ids that may be sampled, by the model as it is before the first step; the reference sees no token."""
    module = fit({"minibatches": 1, "kl_coef": 0.3, "entropy_coef": 0.2, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}, max_epochs=1)
    (data,), size = module.drawn, 300
    reference, policy = AutoModelForCausalLM.from_pretrained(sft_dir), module.policy.lm
    banned = module.policy.banned[: reference.config.vocab_size]
    sums, count = torch.zeros(3), 0
    for n in range(data.num_responses):
        prompt, ids = data.prompt_ids[n][data.prompt_mask[n]], data.response_ids[n][data.response_mask[n]]
        token = torch.tensor([module.token_ids[data.columns["quantile"][n]]])
        with torch.no_grad():
            mine = policy(input_ids=torch.cat([token, prompt, ids])[None]).logits[0, len(prompt) : -1, : len(banned)]
            other = reference(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        p, q = (torch.where(banned, -1e30, x).log_softmax(-1) for x in (mine, other))
        mean = lambda x, p=p: (p.exp() * x).sum()  # noqa: E731
        sums += torch.stack([-p[torch.arange(len(ids)), ids].sum(), mean(p - q), -mean(p)])
        count += len(ids)
    nll, kl, entropy = (sums / count).tolist()
    found = module.updates[0]
    assert [found["train/lm_loss"], found["train/kl"], found["train/entropy"]] == pytest.approx([nll, kl, entropy], abs=2e-4)
    assert found["train/loss"] == pytest.approx(nll + 0.3 * kl - 0.2 * entropy, abs=2e-4) and kl > 1e-3
    assert size <= len(banned)


def test_the_pool_and_what_is_drawn_from_it(fit):
    module = fit({"responses_per_prompt": 2})
    assert module.pool.num_responses == 32 == len(module.scores) and module.rollouts[1]["rollout/episodes"] == 32
    assert not set(module.token_ids) & set(module.pool.response_ids[module.pool.response_mask].tolist())
    data = module.drawn[1]

    def keys(batch):
        pairs = ((batch.prompt_ids, batch.prompt_mask), (batch.response_ids, batch.response_mask))
        return list(zip(*([tuple(row[kept].tolist()) for row, kept in zip(*pair, strict=True)] for pair in pairs), strict=True))

    rows = dict(zip(keys(module.pool), module.scores.tolist(), strict=True))
    by_quantile = {0: [], 1: [], 2: []}
    for key, quantile in zip(keys(data), data.columns["quantile"], strict=True):
        by_quantile[quantile].append(rows[key])
    assert len(data.columns["quantile"]) == 32 and sorted(len(x) for x in by_quantile.values()) == [10, 11, 11]  # the pool once
    assert max(by_quantile[0]) <= min(by_quantile[1]) and max(by_quantile[1]) <= min(by_quantile[2])
    late = fit({"no_eos_score": -50.0, "sampling": Sampling(3, 1.0)})
    assert -50.0 in late.scores.tolist() and late.rollouts[0]["rollout/score"] > -50.0


def test_it_learns_what_the_best_token_means(fit, sft_rows, tmp_path, make_trainer):
    settings = {"reward_fn": brief, "num_prompts": 32, "minibatch_size": 32, "minibatches": 8}
    settings["optimizer"] = lambda p: torch.optim.AdamW(p, lr=3e-3)
    module = fit(settings, {"val_data": sft_rows[:4]}, max_epochs=6, callbacks=[ExportHF(str(tmp_path / "hf"))])
    assert module.rollouts[-1]["rollout/score"] > module.rollouts[0]["rollout/score"] + 1.5
    assert {"val/score", "val/kl", "val/length", "val/eos_rate", "val/rouge1"} <= module.trainer.callback_metrics.keys()
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_tokens_to_ids("<|quantile_2|>") == module.token_ids[2]

    def ends_at_once(k):  # the exported model's probability of EOS behind quantile k's token
        with torch.no_grad():
            logits = lm(**tokenizer(f"<|quantile_{k}|>{sft_rows[0]['prompt']}", return_tensors="pt")).logits
        return float(logits[0, -1].softmax(-1)[tokenizer.eos_token_id])

    assert ends_at_once(2) > 2 * ends_at_once(0)
    data = PromptDataModule(sft_rows, test_data=sft_rows[:4], max_prompt_tokens=64)
    again = Quark(str(tmp_path / "hf"), reward_fn=vowels, num_quantiles=3, sampling=Sampling(8, 1.0))
    (rows,) = make_trainer().predict(again, datamodule=data)
    (same,) = make_trainer().predict(module, datamodule=data)
    assert [row["response"] for row in rows] == [row["response"] for row in same] and rows[0].keys() >= {"score", "kl", "reference"}


def test_micro_batches_change_nothing(fit):
    one, two = fit(), fit(accumulate_grad_batches=2)
    assert [s["train/loss"] for s in two.updates] == pytest.approx([s["train/loss"] for s in one.updates], abs=1e-3)
    assert [r["rollout/score"] for r in two.rollouts] == pytest.approx([r["rollout/score"] for r in one.rollouts])


def test_refuses(sft_dir):
    for wrong in ({"num_quantiles": 1}, {"num_prompts": 0}, {"minibatch_size": 0}):
        with pytest.raises(ValueError, match="num_quantiles"):
            Quark(sft_dir, reward_fn=vowels, **wrong)
