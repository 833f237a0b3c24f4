"""What is refused of strategies, precisions and sharded checkpoints, and the small parts of sharding that one process can show."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from strategy_zoo import strategy
from torch import nn
from torch.distributed.checkpoint import save
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lit_rlhf import PPO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, SFTDataModule, checkpoints, cli
from lit_rlhf.consolidate import consolidate, main, merged
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.sharding import any_rank, clip_gradients, gathered, is_sharded, most, name_weights, saves_shards, shard, whole_state
from lit_rlhf.strategies import check_directory, check_shard_names, check_strategy, refuse_strategy


def module_under(strategy, precision="32-true", world=2, module=None, callbacks=(), ckpt_path=None):
    """A module as `setup` finds it: with a Trainer that has a strategy."""
    module = module or nn.Module()
    seen = {"checkpoint_callbacks": list(callbacks), "ckpt_path": ckpt_path}
    module.trainer = SimpleNamespace(strategy=strategy, precision=precision, world_size=world, **seen)
    return module


def on_mesh(size: int, sharded: bool = False) -> ModelParallelStrategy:
    made = ModelParallelStrategy(size, save_distributed_checkpoint=sharded)
    made._device_mesh = {"data_parallel": SimpleNamespace(size=lambda: size)}
    return made


# DeepSpeed


@pytest.mark.parametrize("option", ["deepspeed", "deepspeed_stage_3_offload", "DeepSpeedStrategy"])
def test_deepspeed_is_refused_in_one_line_that_names_the_overlay(capsys, sft_dir, option):
    code = cli.main(["fit", f"--config={cli.config_dir() / 'tldr/sft.yaml'}", f"--model.model={sft_dir}", f"--trainer.strategy={option}"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1, lines
    assert "DeepSpeed is not supported" in lines[0] and "configs/strategy/fsdp.yaml" in lines[0]


def test_deepspeed_is_refused_as_an_object_too():
    made = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its constructor asks for the package
    with pytest.raises(ValueError, match="configs/strategy/fsdp.yaml"):
        refuse_strategy(made)
    for fine in ("ddp", "fsdp", "auto", None, SimpleNamespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy")):
        refuse_strategy(fine)


# Precision


def test_16_true_is_refused_by_every_module(sft_dir, make_trainer, sft_rows, pair_rows):
    ppo = PPO(sft_dir, reward_fn=lambda prompts, responses: [0.0] * len(responses))
    runs = [
        (SFT(sft_dir), SFTDataModule(sft_rows)),
        (PairwiseReward(sft_dir), PairwiseDataModule(pair_rows)),
        (ppo, PromptDataModule(sft_rows)),
    ]
    for module, data in runs:
        with pytest.raises(ValueError, match="precision 16-true is not supported.*bf16-mixed"):
            make_trainer(precision="16-true", max_steps=1).fit(module, data)


# FSDP2


def test_a_mesh_that_is_not_all_data_parallel_is_refused():
    check_strategy(module_under(on_mesh(2)))
    with pytest.raises(ValueError, match="data_parallel_size 1 on 2 processes; set data_parallel_size to 2 and tensor_parallel_size to 1"):
        check_strategy(module_under(on_mesh(1)))


def test_networks_made_before_the_trainer_are_refused_since_none_would_be_sharded():
    with pytest.raises(ValueError, match="made before this Trainer"):
        check_strategy(module_under(on_mesh(2), module=nn.Linear(2, 2)))


# FSDP1


def test_fsdp1_without_original_parameters_is_refused():
    with pytest.raises(ValueError, match="use_orig_params: true"):
        check_strategy(module_under(FSDPStrategy(use_orig_params=False)))


def test_fsdp1_over_a_wrapped_network_is_refused(monkeypatch):
    wrapped = nn.Sequential(FullyShardedDataParallel.__new__(FullyShardedDataParallel))
    nn.Module.__init__(wrapped[0])
    with pytest.raises(ValueError, match="wrapped in FSDP already"):
        check_strategy(module_under(FSDPStrategy(), module=wrapped))


def test_fsdp1_mixes_precision_by_autocast_alone():
    """Lightning's own setting casts weights, buffers (a reward model's mean) and reductions."""
    mixed, own = FSDPStrategy(), FSDPStrategy(mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    check_strategy(module_under(mixed, "bf16-mixed"))
    check_strategy(module_under(own, "bf16-mixed"))
    assert own.mixed_precision.param_dtype == torch.bfloat16
    used = mixed.mixed_precision_config
    assert (used.param_dtype, used.reduce_dtype, used.buffer_dtype) == (None, None, None)


def test_fsdp1_wraps_the_blocks_of_all_networks_unless_told_otherwise(sft_dir):
    made = FSDPStrategy()
    network = shard(CausalPolicy.load(sft_dir), SimpleNamespace(strategy=made))
    policy = made.kwargs["auto_wrap_policy"]
    assert [policy(m, False, 1) for m in (network.lm.model.layers[1], network.lm.model, network.lm.lm_head)] == [True, False, False]
    assert policy(network, True, 10**9)  # looks inside everything
    own = FSDPStrategy(auto_wrap_policy={nn.Embedding})
    shard(network, SimpleNamespace(strategy=own))
    assert own.kwargs["auto_wrap_policy"]._module_classes == {nn.Embedding}


def test_auto_wrap_policy_in_yaml():
    layer = "transformers.models.llama.modeling_llama.LlamaDecoderLayer"
    parser = LightningArgumentParser()
    parser.add_argument("--strategy", type=Strategy)
    text = {"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy", "init_args": {"auto_wrap_policy": [layer]}}}
    made = parser.instantiate(parser.parse_object(text)).strategy
    assert isinstance(made.kwargs["auto_wrap_policy"], ModuleWrapPolicy)
    assert made.kwargs["auto_wrap_policy"]._module_classes == {LlamaDecoderLayer}


# Names of sharded checkpoints


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"save_last": True}, "save_last: link"),
        ({"filename": "best"}, "has no {step}"),
        ({"filename": "{epoch}"}, "has no {step}"),
        ({"enable_version_counter": False}, "enable_version_counter"),
    ],
)
def test_sharded_checkpoints_are_never_written_over_each_other(arguments, said):
    callback = ModelCheckpoint(**arguments)
    with pytest.raises(ValueError, match=said):
        check_strategy(module_under(on_mesh(2, sharded=True), callbacks=[callback]))
    check_strategy(module_under(on_mesh(2), callbacks=[callback]))  # whole files are replaced in one piece


def test_names_that_are_fine_for_shards():
    check_shard_names(ModelCheckpoint())
    check_shard_names(ModelCheckpoint(filename="{epoch}-{step}", save_last="link"))


@pytest.mark.parametrize(("name", "sharded", "expected"), [("ddp", False, False), *((n, s, s) for n in ("fsdp1", "fsdp2") for s in (0, 1))])
def test_saves_shards(name, sharded, expected):
    assert saves_shards(SimpleNamespace(strategy=strategy(name, sharded=bool(sharded)))) == bool(expected)


def test_half_a_directory_is_refused(tmp_path):
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(ValueError, match="was cut off while it was written.*give the one before"):
        check_strategy(module_under(on_mesh(2), ckpt_path=tmp_path))


@pytest.mark.parametrize("made", [FSDPStrategy(), on_mesh(2)], ids=["fsdp1", "fsdp2"])
def test_a_file_with_code_in_it_is_not_opened_by_a_sharded_strategy(tmp_path, made):
    """Lightning's FSDPStrategy reads whole files with a plain unpickler."""
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2", "run": Path}, tmp_path / "bad.ckpt")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, tmp_path / "good.ckpt")
    with pytest.raises(ValueError, match="which could be code: it is not loaded"):
        check_strategy(module_under(made, ckpt_path=tmp_path / "bad.ckpt"))
    check_strategy(module_under(made, ckpt_path=tmp_path / "good.ckpt"))


@pytest.mark.parametrize(("key", "by"), [("model", "FSDP1"), ("state_dict", "FSDP2")])
def test_shards_of_another_strategy_are_refused_with_the_command_that_helps(tmp_path, key, by):
    save({key: {"policy.w": torch.ones(2)}}, checkpoint_id=tmp_path / "shards", no_dist=True)
    (tmp_path / "shards" / "meta.pt").touch()
    made = {"FSDP1": FSDPStrategy(), "FSDP2": on_mesh(2), "whole files": strategy("ddp")}
    check_directory(tmp_path / "shards", made.pop(by))
    for kind, other in made.items():
        with pytest.raises(ValueError, match=f"written by {by}, and this strategy reads {kind}; .*lit-rlhf consolidate {tmp_path}/shards "):
            check_directory(tmp_path / "shards", other)


# One process needs none of it


def test_a_plain_network_asks_no_other_rank():
    network = nn.Linear(2, 1)
    assert not is_sharded(network) and most(network, 3) == 3 and any_rank(network, True) and not any_rank(network, False)
    with gathered(network) as mine:
        assert mine and whole_state(network).keys() == {"weight", "bias"}


def test_clipping_is_the_trainers_outside_of_fsdp1():
    asked = []
    module = SimpleNamespace(trainer=SimpleNamespace(model=nn.Linear(1, 1)), clip_gradients=lambda *a: asked.append(a))
    clip_gradients(module, "optimizer", 0.5, "norm")
    assert asked == [("optimizer", 0.5, "norm")]


# Optimizer states by name


def test_optimizer_states_are_called_by_name():
    """The second group's weight is the module's third: a count over all parameters would take it for the frozen second."""
    module = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("policy", "reference", "value")})
    module["reference"].requires_grad_(False)
    module.trainer = SimpleNamespace(strategy=None, optimizers=[])
    optimizer = torch.optim.SGD([{"params": module["policy"].parameters()}, {"params": module["value"].parameters()}], momentum=0.9)
    module.trainer.optimizers.append(optimizer)
    (module["policy"](torch.ones(1)) + 2 * module["value"](torch.ones(1))).sum().backward()
    optimizer.step()
    checkpoint = {"optimizer_states": [optimizer.state_dict()]}
    name_weights(module, checkpoint)
    state = checkpoint["optimizer_states"][0]
    assert [group["params"] for group in state["param_groups"]] == [["policy.weight"], ["value.weight"]]
    assert {name: float(s["momentum_buffer"]) for name, s in state["state"].items()} == {"policy.weight": 1.0, "value.weight": 2.0}
    optimizer.load_state_dict(state)
    assert [float(optimizer.state[p]["momentum_buffer"]) for g in optimizer.param_groups for p in g["params"]] == [1.0, 2.0]


def test_a_whole_file_without_a_weight_that_trains_is_refused_after_a_sharded_load(tmp_path):
    """FSDP2 loads what it finds and takes the weights out of the checkpoint before a module sees it."""
    module, path = module_under(on_mesh(1), world=1, module=nn.Linear(2, 1)), tmp_path / "a.ckpt"
    module.trainer.ckpt_path = path
    torch.save({"state_dict": {"weight": torch.ones(1, 2)}, "pytorch-lightning_version": "2"}, path)
    found = checkpoints._weights(module, {})
    assert found.keys() == {"weight"} and checkpoints._weights(module, {"state_dict": "given"}) == "given"
    with pytest.raises(ValueError, match="lacks 1 of the 2 weights that train, bias first"):
        checkpoints._check_weights(module, found)


# From shards to a whole file


def test_merged_leaves_out_networks_that_did_not_train():
    state = {"state": {"policy.w": {"step": 1}}, "param_groups": [{"params": ["policy.w"], "lr": 0.1}]}
    weights = {"policy.w": 1, "policy.mean": 2, "reference.w": 3}
    for key in ("model", "state_dict"):
        assert merged({key: weights, "optimizer_0": state}, {"epoch": 4}) == {
            "epoch": 4,
            "state_dict": {"policy.w": 1, "policy.mean": 2},
            "optimizer_states": [state],
        }
    assert merged({"model": weights}, {})["state_dict"] == weights


def test_consolidate_refuses_what_is_not_whole(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="is no sharded checkpoint"):
        consolidate(tmp_path, tmp_path / "out.ckpt")
    (tmp_path / "__0_0.distcp").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="was cut off while it was written"):
        consolidate(tmp_path, tmp_path / "out.ckpt")
    assert main([str(tmp_path / "nowhere"), "x"]) == 2
    assert "there is no such directory" in capsys.readouterr().err
    for name in ("meta.pt", ".metadata", "out.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match="name another file"):
        consolidate(tmp_path, tmp_path / "out.ckpt")


def test_the_page_names_files_and_options_that_exist():
    page = (cli.config_dir().parent / "tutorials" / "strategies.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:configs|tests)/[\w/]+\.(?:yaml|py)", page))
    assert len(named) >= 8 and all((cli.config_dir().parent / name).is_file() for name in named)
    assert {f"configs/strategy/{p.name}" for p in (cli.config_dir() / "strategy").iterdir()} <= named
