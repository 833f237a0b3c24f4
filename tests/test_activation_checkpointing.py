"""activation_checkpointing: the same numbers from every family, adapter, frozen block and dropout, and one kept tensor a block."""

import peft
import pytest
import torch
from families import PACKED, PLAIN, TOKENIZER, build, gradients, policy_of, scalar_of
from lightning.pytorch.strategies import FSDPStrategy
from test_networks import batch
from test_strategy_checks import module_under
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_rlhf import PPO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule
from lit_rlhf.batch import Batch
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.planning.tracker import Tracker
from lit_rlhf.pretrained import add_adapter, checkpoint_activations, freeze
from lit_rlhf.strategies import check_strategy

COMMON = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05), "scheduler": Schedule("constant")}


def blocks_run(model: nn.Module) -> list[int]:
    """Grows by one with each run of the first block's attention or its like, in forward or in recomputation."""
    seen: list[int] = []
    stack = next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    next(stack[0].children()).register_forward_hook(lambda *_: seen.append(1))
    return seen


def loss_and_gradients(net, change=lambda model: None, checkpointed=False) -> tuple[torch.Tensor, dict, int]:
    """The loss of a batch, its gradients, and how often the first block was run; dropout replays from the same seed."""
    model = net.lm if hasattr(net, "lm") else net.model
    change(model)
    if checkpointed:
        checkpoint_activations(model)
    model.train()
    seen = blocks_run(model)
    torch.manual_seed(0)
    with gradients(model) as found:
        out = net(batch())
        loss = (out[0] if isinstance(out, tuple) else out).square().mean()
        loss.backward()
    return loss.detach(), found, len(seen)


def same(make, change=lambda model: None) -> None:
    torch.manual_seed(5)
    loss, plain, once = loss_and_gradients(make(), change)
    torch.manual_seed(5)
    again, recomputed, twice = loss_and_gradients(make(), change, checkpointed=True)
    assert torch.equal(loss, again) and plain.keys() == recomputed.keys() and any(g.abs().max() > 1e-3 for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-6, msg=name)
    assert (once, twice) == (1, 2)


@pytest.mark.parametrize("family", [*PACKED, *PLAIN])
def test_every_family(family):
    same(lambda: policy_of(family, 1.0 if family == "gpt_neo" else 3.0))


def dropout(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5


def lora(model: nn.Module) -> None:
    add_adapter(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2))


@pytest.mark.parametrize("change", [lora, dropout])
@pytest.mark.parametrize("kind", ["policy", "scalar"])
def test_adapters_and_dropout(kind, change):
    same(lambda: policy_of("llama") if kind == "policy" else scalar_of("llama"), change)


def test_frozen_blocks_are_not_computed_again():
    """Backward never reaches the lowest block, so nothing asks for its recomputation; the second one is computed twice."""
    results = []
    for checkpointed in (False, True):
        net = policy_of("llama")
        counts = [0, 0]
        for i, block in enumerate(net.lm.model.layers):
            block.self_attn.register_forward_hook(lambda *_, i=i, counts=counts: counts.__setitem__(i, counts[i] + 1))
        results.append((*loss_and_gradients(net, lambda model: freeze(model, 1), checkpointed)[:2], counts))
    (loss, plain, once), (again, recomputed, twice) = results
    assert torch.equal(loss, again) and plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-6)
    assert (once, twice) == ([1, 1], [1, 2])


def kept(blocks: int, checkpointed: bool, tokens: int = 40) -> tuple[int, int]:
    """Bytes that a forward pass leaves for backward, and the peak of backward, above weights and gradients."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=4)
    net = CausalPolicy(LlamaForCausalLM(config), TOKENIZER).train()
    if checkpointed:
        checkpoint_activations(net.lm)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    rows = Batch.of([[5] * (tokens // 2)] * 4, [[6] * (tokens // 2)] * 4)
    with Tracker() as tracker:
        tracker.watch([*net.parameters(), *(p.grad for p in net.parameters())])
        before = tracker.live
        loss = net(rows)[0].sum()
        forward = tracker.live - before
        with tracker.phase("backward"):
            loss.backward()
        return forward, tracker.peaks()["backward"] - before


def test_a_block_keeps_its_input_alone():
    """4 rows of 40 tokens of 32 float32 numbers are 20,480 bytes a block. Without, a Llama block keeps at least what its seven products
    and its attention read: two normed inputs (2 x 20,480), q, k, v and the attention's output (4 x 20,480), gate, up, silu(gate) and
    their product (4 x 40,960), and both norms' inputs (2 x 20,480)."""
    (whole8, peak8), (whole4, _) = kept(8, False), kept(4, False)
    (less8, low8), (less4, _) = kept(8, True), kept(4, True)
    assert (less8 - less4) / 4 == 4 * 40 * 32 * 4 == 20_480
    assert (whole8 - whole4) / 4 >= 8 * 20_480 + 4 * 40_960
    print(f"\na block keeps {(less8 - less4) // 4:,} bytes, {(whole8 - whole4) // 4:,} without; peak of 8 blocks {low8:,} and {peak8:,}")
    assert low8 < peak8 / 2


@pytest.fixture
def weights(make_trainer, sft_dir, reward_dir, sft_rows, pair_rows):
    """weights(stage, **settings) -> what the stage's fit leaves, and PPO's texts."""

    def run(stage: str, **settings) -> tuple[torch.Tensor, list[str]]:
        ppo = {"batch_size": 8, "responses_per_prompt": 2, "ppo_epochs": 2, "minibatches": 2, "sampling": Sampling(8, 1.0)}
        module, data, steps = {
            "sft": lambda: (SFT(sft_dir, **COMMON, **settings), SFTDataModule(sft_rows, batch_size=8, val_data=sft_rows[:4]), 3),
            "reward": lambda: (PairwiseReward(sft_dir, **COMMON, **settings), PairwiseDataModule(pair_rows, batch_size=8), 3),
            "ppo": lambda: (PPO(sft_dir, reward_model=reward_dir, **ppo, **COMMON, **settings), PromptDataModule(sft_rows), 8),
        }[stage]()
        make_trainer(max_steps=steps).fit(module, data)
        texts = module.tokenizer.batch_decode(list(module.experience.batch.response_ids)) if stage == "ppo" else []
        return torch.cat([p.detach().flatten() for p in module.parameters()]), texts

    return run


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_ends_with_the_same_weights(weights, stage, monkeypatch):
    """PPO samples in training mode with a cache, which transformers' own switch would drop: the texts are the same too."""
    plain, texts = weights(stage)
    used = []
    monkeypatch.setattr("lit_rlhf.pretrained.checkpoint", counted(used))
    recomputed, same_texts = weights(stage, activation_checkpointing=True)
    torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=0)
    assert texts == same_texts
    networks = {"sft": 1, "reward": 1, "ppo": 2}[stage]
    assert len(used) == networks * 2 * {"sft": 3, "reward": 3, "ppo": 8}[stage]  # networks x blocks x steps, nothing without gradients


def counted(used: list):
    from torch.utils.checkpoint import checkpoint

    return lambda *args, **more: used.append(1) or checkpoint(*args, **more)


def test_a_model_without_blocks_is_refused():
    model = build(AutoModelForCausalLM, "llama")
    model.model.layers = model.model.layers[:1]  # not as many as its config says
    with pytest.raises(ValueError, match="activation_checkpointing: LlamaForCausalLM has no stack of blocks to recompute; leave it out"):
        checkpoint_activations(model)


def test_twice_is_refused(sft_dir):
    """FSDP1 has a switch of its own."""
    strategy = FSDPStrategy(activation_checkpointing_policy={nn.Linear})
    check_strategy(module_under(strategy, module=SFT(sft_dir)))
    with pytest.raises(ValueError, match="is on in the model and in strategy fsdp"):
        check_strategy(module_under(strategy, module=SFT(sft_dir, activation_checkpointing=True)))
