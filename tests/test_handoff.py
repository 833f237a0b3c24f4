"""SFT -> reward -> PPO through exported directories, which plain transformers reads to the same numbers."""

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from lit_rlhf import PPO, SFT, ExportHF, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule
from lit_rlhf.batch import Batch
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.scoring import ModelScorer

SETTINGS = {"optimizer": lambda params: torch.optim.AdamW(params, lr=3e-3), "scheduler": Schedule("constant")}


@pytest.fixture
def runs(tmp_path, make_trainer, sft_dir, sft_rows, pair_rows):
    """Runs the three stages, each from the directories of those before, and returns where they lie and the modules."""
    sft = SFT(sft_dir, **SETTINGS)
    make_trainer(max_steps=4, callbacks=[ExportHF(str(tmp_path / "sft/hf"))]).fit(sft, datamodule=SFTDataModule(sft_rows, batch_size=8))
    reward = PairwiseReward(str(tmp_path / "sft/hf"), **SETTINGS)
    data = PairwiseDataModule(pair_rows, batch_size=8)
    make_trainer(max_steps=4, callbacks=[ExportHF(str(tmp_path / "reward/hf"))]).fit(reward, datamodule=data)
    ppo = PPO(
        str(tmp_path / "sft/hf"),
        reward_model=str(tmp_path / "reward/hf"),
        batch_size=8,
        sampling=Sampling(8, 1.0),
        ppo_epochs=2,
        **SETTINGS,
    )
    make_trainer(max_steps=4, callbacks=[ExportHF(str(tmp_path / "ppo/hf"))]).fit(
        ppo, datamodule=PromptDataModule(sft_rows, max_prompt_tokens=64)
    )
    return tmp_path, sft, reward, ppo


def test_the_three_stages(runs, pair_rows):
    path, sft, reward, ppo = runs
    tokenizer = AutoTokenizer.from_pretrained(path / "sft/hf")
    texts = [(row["prompt"], row[side]) for row in pair_rows[:4] for side in ("chosen", "rejected")]
    rows = [(tokenizer(p)["input_ids"], [*tokenizer(r)["input_ids"], tokenizer.eos_token_id]) for p, r in texts]
    batch = Batch.of([p for p, _ in rows], [r for _, r in rows], columns={"prompt": [p for p, _ in texts]})

    # the same language model, by every door
    for directory, policy in (("sft/hf", sft.policy), ("ppo/hf/policy", ppo.policy)):
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
            f.name for f in (path / directory).iterdir()
        }
        lm = AutoModelForCausalLM.from_pretrained(path / directory)
        with torch.no_grad():
            logprobs = policy(batch)[0]
            torch.testing.assert_close(CausalPolicy.load(str(path / directory))(batch)[0], logprobs, atol=1e-5, rtol=0)
            for n, (prompt, response) in enumerate(rows):
                ids = torch.tensor([prompt + response])
                torch.testing.assert_close(lm(ids).logits, policy.lm(ids).logits, atol=1e-5, rtol=0)
                wanted = lm(ids).logits[0].log_softmax(-1)[torch.arange(len(response)) + len(prompt) - 1, torch.tensor(response)]
                torch.testing.assert_close(logprobs[n, : len(response)], wanted, atol=1e-5, rtol=0)

    # the same raw score, by every door: ours minus the mean
    model = AutoModelForSequenceClassification.from_pretrained(path / "reward/hf")
    with torch.no_grad():
        raw = torch.cat([model(torch.tensor([p + r])).logits[0] for p, r in rows])
    piped = pipeline("text-classification", model=str(path / "reward/hf"))
    by_pipe = torch.tensor([piped([p + r + tokenizer.eos_token])[0]["score"] for p, r in texts])
    joined = torch.cat([model(torch.tensor([tokenizer(p + r + tokenizer.eos_token)["input_ids"]])).logits[0].detach() for p, r in texts])
    torch.testing.assert_close(by_pipe, joined, atol=1e-5, rtol=0)  # no sigmoid
    ours = ModelScorer(ScalarModel.load(str(path / "reward/hf")))([p for p, _ in texts], [r for _, r in texts], {})
    torch.testing.assert_close(ours, raw - model.config.reward_mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(ppo.scorer([p for p, _ in texts], [r for _, r in texts], {}), ours, atol=1e-5, rtol=0)

    # the value network, as a directory of its own
    value = AutoModelForSequenceClassification.from_pretrained(path / "ppo/hf/value")
    with torch.no_grad():
        last = torch.cat([value(torch.tensor([p + r])).logits[0] for p, r in rows]) - value.config.reward_mean
        values = ppo.value(batch).gather(1, batch.response_mask.sum(1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(values, last, atol=1e-5, rtol=0)

    # reward training started from the SFT weights, PPO's reference is the SFT model
    frozen = AutoModelForCausalLM.from_pretrained(path / "sft/hf").state_dict()
    assert all(torch.equal(p, frozen[name]) for name, p in ppo.reference.lm.state_dict().items())


def test_a_stage_refuses_the_wrong_directory(runs, tmp_path, sft_dir):
    path = runs[0]
    with pytest.raises(ValueError, match="has no reward head"):
        ScalarModel.load(str(path / "sft/hf"))
    with pytest.raises(ValueError, match="is a reward or value model"):
        CausalPolicy.load(str(path / "reward/hf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        SFT(str(tmp_path / "empty"))


def test_push_to_hub(sft_dir, reward_dir, monkeypatch):
    """A plain Hugging Face directory goes up as one commit of a repository that is made where it is missing."""
    sent = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            sent["repo"] = (repo_id, kwargs["private"], kwargs["exist_ok"])

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            from pathlib import Path

            sent["files"] = {f.name for f in Path(folder_path).iterdir()}
            sent["message"] = commit_message
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    for network in (CausalPolicy.load(sft_dir), ScalarModel.load(reward_dir)):
        assert network.push_to_hub("me/mine", private=True, commit_message="epoch 1") == "https://hub/me/mine"
        assert sent["repo"] == ("me/mine", True, True) and sent["message"] == "epoch 1"
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= sent["files"]
