"""The peaks that `lit-rlhf plan` says against those of real steps: a Llama of 3M parameters, one thread, everything that is alive."""

import json

import lightning as L
import pytest
import torch
from plan_config import write_config
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lit_rlhf.__main__ import main
from lit_rlhf.data import PairwiseDataModule, PromptDataModule, SFTDataModule
from lit_rlhf.generation import Sampling
from lit_rlhf.modules import PPO, SFT, PairwiseReward
from lit_rlhf.planning.measure import measure
from lit_rlhf.planning.tracker import Tracker

PROMPT, RESPONSE = 40, 12


@pytest.fixture(scope="module")
def llamas(tmp_path_factory, tokenizer) -> tuple[str, str]:
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    out = []
    for auto, more in ((LlamaForCausalLM, {}), (LlamaForSequenceClassification, {"num_labels": 1})):
        path = tmp_path_factory.mktemp("llama")
        auto(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **shape, **ids, **more)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        out.append(str(path))
    return out[0], out[1]


@pytest.fixture(scope="module")
def even_rows(tokenizer) -> list[dict]:
    """Rows of words that are one token: prompts of PROMPT tokens, responses of RESPONSE with their EOS."""
    words = [w for w in ("the", "cat", "on", "and", "it", "my", "so", "was", "far") if len(tokenizer(" " + w)["input_ids"]) == 1]
    assert len(tokenizer(words[0])["input_ids"]) == 1 and len(words) > 2
    text = lambda i, n: " ".join(words[(i + k * k) % len(words)] for k in range(n))  # noqa: E731
    first = " ".join([words[0], text(1, PROMPT - 1)])
    assert len(tokenizer(first)["input_ids"]) == PROMPT
    return [
        {"prompt": f"{words[0]} {text(i, PROMPT - 1)}", "chosen": " " + text(i, RESPONSE - 1), "rejected": " " + text(i + 1, RESPONSE - 1)}
        for i in range(32)
    ]


@pytest.mark.parametrize(
    ("stage", "precision", "recomputed"),
    [
        ("sft", "32-true", False),
        ("sft", "bf16-mixed", False),
        ("sft", "32-true", True),
        ("reward", "bf16-true", False),
        ("ppo", "32-true", False),
        ("ppo", "32-true", True),
    ],
)
def test_peaks_of_real_steps(stage, precision, recomputed, llamas, even_rows, make_trainer, tmp_path, capsys):
    policy, reward = llamas
    labelled = [{"prompt": row["prompt"], "label": row["chosen"]} for row in even_rows]
    sampling, switch = Sampling(max_new_tokens=RESPONSE), {"activation_checkpointing": recomputed}
    ppo = {"batch_size": 16, "responses_per_prompt": 2, "minibatches": 2, "ppo_epochs": 1}
    model, module, data, more = {
        "sft": (
            {},
            SFT(policy, sampling=sampling, **switch),
            SFTDataModule(labelled, val_data=labelled[:8], batch_size=8),
            {"max_steps": 3},
        ),
        "reward": ({}, PairwiseReward(policy), PairwiseDataModule(even_rows, val_data=even_rows[:8], batch_size=8), {"max_steps": 3}),
        "ppo": (
            {"reward_model": reward, **ppo},
            PPO(policy, reward_model=reward, sampling=sampling, **ppo, **switch),
            PromptDataModule(labelled),
            {"max_steps": 5},
        ),
    }[stage]
    trainer = make_trainer(precision=precision, accumulate_grad_batches=2, val_check_interval=None if stage == "ppo" else 2, **more)

    def fit(callback: L.Callback) -> None:
        trainer.callbacks.append(callback)
        trainer.fit(module, data)

    real = measure(fit)
    file = write_config(
        tmp_path,
        policy,
        stage,
        model=model | switch | ({} if stage == "reward" else {"sampling": {"max_new_tokens": RESPONSE}}),
        trainer={"precision": precision, "accumulate_grad_batches": 2},
    )
    capsys.readouterr()
    main(
        [
            "plan",
            "--config",
            file,
            "--flops=1e9",
            "--accelerator=cpu",
            f"--prompt_tokens={PROMPT}",
            f"--response_tokens={RESPONSE}",
            "--json",
        ]
    )
    peaks = json.loads(capsys.readouterr().out)["asked"]["peaks"]
    print(f"\n{stage} {precision} recomputed {recomputed}: planned {peaks}, real {real}")
    assert max(peaks.values()) == pytest.approx(max(real.values()), rel=0.03)  # asked for are 15%
    for phase in {"training", "optimizer step", "sampling", "scoring"} & set(peaks):
        assert peaks[phase] == pytest.approx(real[phase], rel=0.15), phase


def test_the_tracker_counts_storages_while_they_live():
    with Tracker() as tracker:
        with tracker.phase("one"):
            a = torch.zeros(1000)
            b = a.view(10, 100)[1:]  # the same storage
            c = torch.zeros(500)
        assert tracker.live == 4 * 1500
        del c
        with tracker.phase("two"):
            a = a + 1  # b keeps the old one alive
        assert tracker.live == 4 * 2000 and tracker.peaks() == {"one": 6000, "two": 8000}
        del a, b
    assert tracker.live == 0
