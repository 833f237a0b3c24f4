"""`lit-rlhf plan`: parameters and bytes worked by hand; test_plan_measured.py has its peaks against real steps."""

import json
from pathlib import Path

import pytest
from plan_config import write_config
from torch._subclasses import FakeTensorMode

from lit_rlhf.__main__ import main
from lit_rlhf.planning.run import parse_bytes

# A Llama small enough to count: vocabulary 10, hidden size 8, 2 blocks, 2 heads of size 4, MLP 16, head not tied.
# embeddings 10 x 8 = 80; block: q, k, v, o 4 x 64 = 256, gate, up, down 3 x 8 x 16 = 384, two norms 16: 656; final norm 8; head 80
#   policy: 80 + 2 x 656 + 8 + 80 = 1480        scalar model: 80 + 1312 + 8 + a score of 8 weights = 1408
# buffers: rotary frequencies 2 numbers, kept twice; the policy's banned ids 10 bool; the scalar model's mean 1 number
TINY = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
POLICY, SCALAR = 1480, 1408
POLICY_TENSORS = 1 + 2 * 9 + 1 + 1  # embeddings, nine in a block, final norm, head: each has a float32 step counter in Adam
QUICK = ["--flops=1e9", "--accelerator=cpu", "--prompt_tokens=6", "--response_tokens=4"]


@pytest.fixture
def directory(tmp_path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path / "model")


@pytest.fixture
def config(tmp_path, directory):
    """config(stage, model=..., data=..., trainer=...) -> a YAML file."""
    return lambda stage, **settings: write_config(tmp_path, directory, stage, **settings)


@pytest.fixture
def planned(capsys):
    """planned(*args) -> (exit code, what it says as JSON)."""

    def run(*args: str) -> tuple[int, dict]:
        code = main(["plan", *QUICK, *args, "--json"])
        return code, json.loads(capsys.readouterr().out or "{}")

    return run


def refused(capsys, *args: str) -> str:
    assert main(["plan", *args]) == 2
    out = capsys.readouterr()
    error = out.err.strip().splitlines()[-1]
    assert out.out == "" and error.startswith("lit-rlhf: error: ")
    return error


# Parameters and bytes, by hand


def test_sft_in_float32(planned, config):
    code, found = planned("--config", config("sft"))
    assert code == 0 and found["parameters"] == {"policy": {"all": POLICY, "training": POLICY}}
    asked = found["asked"]
    assert asked["weights"] == {"policy": 4 * POLICY + 2 * 2 * 4 + 10}
    assert (asked["gradients"], asked["buckets"]) == (4 * POLICY, 0)
    assert asked["optimizer"] == 2 * 4 * POLICY + 4 * POLICY_TENSORS  # AdamW
    assert found["checkpoint"] == 4 * POLICY + asked["optimizer"]


def test_a_tied_head_is_counted_once(planned, config, directory):
    (Path(directory) / "config.json").write_text(json.dumps(TINY | {"tie_word_embeddings": True}))
    assert planned("--config", config("sft"))[1]["parameters"]["policy"]["all"] == POLICY - 80


def test_ppo_has_four_networks_of_which_two_train(planned, config):
    found = planned("--config", config("ppo", data={"val_batch_size": 8}, model={"sampling": {"max_new_tokens": 4}}))[1]
    assert found["parameters"] == {
        "policy": {"all": POLICY, "training": POLICY},
        "reference": {"all": POLICY, "training": 0},
        "value": {"all": SCALAR, "training": SCALAR},
        "reward": {"all": SCALAR, "training": 0},
    }
    assert found["asked"]["weights"]["value"] == 4 * SCALAR + 2 * 2 * 4 + 4
    assert found["asked"]["gradients"] == 4 * (POLICY + SCALAR)
    assert set(found["asked"]["peaks"]) == {"loading", "optimizer step", "sampling", "scoring", "training"}
    # keys and values of 8 responses of 6 + 4 tokens in 2 blocks of 8 numbers, but for the last token, which nothing attends to any more
    assert found["asked"]["cache"] == 8 * (6 + 3) * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, 0),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}, 4 * POLICY),
        ({"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "amsgrad": True}}, 3 * 4 * POLICY + 4 * POLICY_TENSORS),
    ],
)
def test_optimizer_state_is_that_of_the_optimizer(planned, config, optimizer, states):
    assert planned("--config", config("sft", model={"optimizer": optimizer}))[1]["asked"]["optimizer"] == states


def test_bf16(planned, config):
    whole = planned("--config", config("sft"))[1]["asked"]
    true = planned("--config", config("sft", trainer={"precision": "bf16-true"}))[1]["asked"]
    mixed = planned("--config", config("sft", trainer={"precision": "bf16-mixed"}))[1]["asked"]
    assert true["weights"]["policy"] == 2 * POLICY + 2 * 2 * 2 + 10 and true["gradients"] == 2 * POLICY
    assert true["optimizer"] == 2 * 2 * POLICY + 4 * POLICY_TENSORS
    assert {name: mixed[name] for name in ("weights", "gradients", "optimizer")} == {
        name: whole[name] for name in ("weights", "gradients", "optimizer")
    }
    assert true["peaks"]["training"] < mixed["peaks"]["training"]


def test_frozen_layers_do_not_train(planned, config):
    found = planned("--config", config("sft", model={"frozen_layers": 1}))[1]
    assert found["parameters"]["policy"] == {"all": POLICY, "training": POLICY - 80 - 656}
    assert found["asked"]["gradients"] == 4 * (POLICY - 80 - 656)


def test_adapters(planned, config):
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
    found = planned("--config", config("ppo", model={"peft": lora}))[1]
    # two layers in each of two blocks, each 8 x 4 + 4 x 8 = 64 numbers; the scalar head trains too; the reference is the policy itself
    assert found["parameters"] == {
        "policy": {"all": POLICY + 256, "training": 256},
        "value": {"all": SCALAR + 256, "training": 256 + 8},
        "reward": {"all": SCALAR, "training": 0},
    }


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_activation_checkpointing_takes_memory_from_training_alone_and_adds_a_pass(accelerator, planned, config, capsys):
    options = ("--config", config("sft"), f"--accelerator={accelerator}")
    plain, recomputed = (planned(*options, f"--model.activation_checkpointing={on}")[1] for on in ("false", "true"))
    before, after = plain["asked"]["peaks"], recomputed["asked"]["peaks"]
    assert after["training"] < before["training"]
    assert {k: v for k, v in after.items() if k != "training"} == {k: v for k, v in before.items() if k != "training"}
    # 8 rows of 10 tokens at 2560 + 320 operations, four passes where there were three (test_hours_by_hand); the head is none of the blocks
    more = recomputed["hours"]["seconds_per_step"]["training"] - plain["hours"]["seconds_per_step"]["training"]
    assert more == pytest.approx(80 * (2560 + 320) / 1e9)
    assert main(["plan", *QUICK, *options, "--model.activation_checkpointing=true"]) == 0
    assert "blocks keep their inputs alone" in capsys.readouterr().out


def test_ddp_holds_the_gradients_twice_and_fsdp_an_eighth_of_all(planned, config):
    ddp = planned("--config", config("sft"), "--devices=8")[1]["asked"]
    assert (ddp["strategy"], ddp["buckets"]) == ("ddp", 4 * POLICY)
    # rows are split, rounded up: embeddings and head 10 rows -> 2 x 8; q, k, v, o 8 rows -> 1 x 8 each; gate, up 16 rows -> 2 x 8 each;
    # down 8 rows -> 1 x 16; norms 8 -> 1 each: a block has 32 + 32 + 16 + 2 = 82, all in all 16 + 2 x 82 + 1 + 16 = 197
    fsdp = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    found = planned("--config", config("sft", trainer={"strategy": fsdp}), "--devices=8")[1]
    assert (found["asked"]["strategy"], found["asked"]["gradients"], found["asked"]["buckets"]) == ("fsdp", 4 * 197, 0)
    assert found["asked"]["optimizer"] == 2 * 4 * 197 + 4 * POLICY_TENSORS
    assert found["checkpoint"] == pytest.approx(3 * 4 * POLICY, rel=0.25)  # of the whole, not of an eighth; ranks round up


def test_fsdp1_is_planned_as_fsdp2(planned, config):
    assert planned("--config", config("sft", trainer={"strategy": "fsdp"}), "--devices=8")[1]["asked"]["gradients"] == 4 * 197


def test_rollouts_hold_the_gradients_between_validations(planned, config):
    with_data = {"model": {"batch_size": 64}, "data": {"val_batch_size": 8}}
    every, seldom = (planned("--config", config("ppo", trainer={"check_val_every_n_epoch": n}, **with_data))[1]["asked"] for n in (1, 10))
    assert seldom["peaks"]["sampling"] - every["peaks"]["sampling"] == 4 * (POLICY + SCALAR)


# Shallow runs stand for deep ones


@pytest.mark.slow  # a dozen simulated runs
@pytest.mark.parametrize("strategy", ["auto", {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}])
@pytest.mark.parametrize("recomputed", [False, True])
def test_two_shallow_runs_give_what_the_whole_network_gives(strategy, recomputed, planned, config, directory, monkeypatch):
    (Path(directory) / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 10}))
    trainer = {"strategy": strategy, "precision": "bf16-mixed"}
    file = config("reward", model={"activation_checkpointing": recomputed}, trainer=trainer)
    short = planned("--config", file, "--devices=2")[1]["asked"]
    monkeypatch.setattr("lit_rlhf.planning.run.is_uniform", lambda *_: False)
    assert planned("--config", file, "--devices=2")[1]["asked"] == short
    monkeypatch.undo()
    used = []
    monkeypatch.setattr("lit_rlhf.planning.simulate.with_depth", lambda source, n: used.append(n) or source)
    planned("--config", file)
    assert used == [4, 5]  # the shortcut was taken


# Verdicts


def test_exit_codes_and_what_to_change(planned, config, capsys):
    file = config("sft", data={"batch_size": 64, "val_batch_size": 1})
    args = ["--config", file, *QUICK, "--reserve=0"]
    whole, half = (planned(*args, f"--trainer.accumulate_grad_batches={n}")[1]["asked"]["peak"] for n in (1, 2))
    assert main(["plan", *args, f"--device_memory={whole}"]) == 0
    assert "FITS" in capsys.readouterr().out
    assert main(["plan", *args, f"--device_memory={whole - 1}"]) == 1
    text = capsys.readouterr().out
    assert half < whole and "DOES NOT FIT" in text
    assert "What fits: no overlay on 1 device with --trainer.accumulate_grad_batches 2." in text
    assert main(["plan", *args, "--device_memory=1kB"]) == 1
    assert "use LoRA" in capsys.readouterr().out
    wide = config("reward", data={"batch_size": 1, "val_batch_size": 1})  # of which a micro-batch cannot be smaller
    one = ["--config", wide, "--flops=1e9", "--accelerator=cpu", "--reserve=0", "--prompt_tokens=600", "--response_tokens=4"]
    main(["plan", *one, "--json"])
    assert main(["plan", *one, f"--device_memory={json.loads(capsys.readouterr().out)['asked']['lasting'] + 1000}"]) == 1
    assert "Use --model.activation_checkpointing true" in capsys.readouterr().out
    assert main(["plan", *args]) == 0
    assert "Give --device_memory" in capsys.readouterr().out


@pytest.mark.slow  # as many
def test_the_overlay_that_fits_is_found(planned, config):
    file = config("sft", data={"batch_size": 64})
    limit = planned("--config", file, "--devices=8", "--device_memory=1GB")[1]
    by_name = {t["overlay"]: t for t in limit["overlays"]}
    ddp, fsdp = by_name["configs/strategy/ddp.yaml"], by_name["configs/strategy/fsdp.yaml"]
    assert fsdp["peak"] < ddp["peak"]
    between = (fsdp["peak"] + ddp["peak"]) // 2
    args = ("--config", file, "--devices=8", "--reserve=0", f"--device_memory={between}")
    code, found = planned(*args, "--trainer.accumulate_grad_batches=8")
    fits = {t["overlay"]: t["fits"] for t in found["overlays"]}
    assert code in (0, 1) and fits["configs/strategy/fsdp.yaml"]


def test_reserve_is_kept_free(planned, config):
    file = config("sft")
    assert planned("--config", file, "--device_memory=1000", "--reserve=0.2")[1]["limit"] == 800


# Hours


def test_hours_by_hand(planned, config):
    file = config("sft", trainer={"max_steps": 100})
    found = planned("--config", file)[1]["hours"]
    # 8 rows of 10 tokens; a block has 640 weights in products: 2 x 2 x 640 = 2560 operations a token, attention 4 x 2 blocks x 8 x (10 / 2)
    # = 320; three passes; the head 2 x 80 on 4 tokens of 8 rows, four passes
    operations = 3 * 80 * (2560 + 320) + 4 * 32 * 160
    assert found["seconds_per_step"] == {"training": pytest.approx(operations / 1e9)}
    assert (found["steps"], found["hours"]) == (100, pytest.approx(100 * operations / 1e9 / 3600))


def test_steps_of_epochs(planned, config, tmp_path):
    file = config("sft", trainer={"max_epochs": 3})
    assert planned("--config", file)[1]["hours"]["hours"] is None
    assert planned("--config", file, "--rows=80")[1]["hours"]["steps"] == 3 * 10
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "label": "b"}\n' * 33)
    assert planned("--config", file, "--data.data", str(rows))[1]["hours"]["steps"] == 3 * 4
    ppo = config("ppo", model={"ppo_epochs": 2, "minibatches": 2}, trainer={"max_epochs": 5})
    assert planned("--config", ppo)[1]["hours"]["steps"] == 5 * 2 * 2


def test_sampling_is_bound_by_reading_the_weights(planned, config):
    file = config("ppo")
    slow = planned("--config", file, "--bandwidth=1e6")[1]["hours"]["seconds_per_step"]["sampling"]
    # 4 tokens, each of which reads 4 x 1480 bytes; the prompts' 48 tokens at 2560 + 4 x 2 x 8 x 5 operations; shared by 4 steps
    assert slow == pytest.approx((4 * 4 * POLICY / 1e6 + 48 * (2560 + 320) / 1e9) / 4)


# Every option moves a number


@pytest.mark.parametrize(
    "option", ["--prompt_tokens=7", "--response_tokens=5", "--devices=2", "--accelerator=gpu", "--trainer.accumulate_grad_batches=4"]
)
def test_options_change_the_peak(option, planned, config):
    file = config("reward")
    before = planned("--config", file)[1]["asked"]["peaks"]["training"]
    code = main(["plan", "--config", file, *QUICK, option, "--json", str(Path(file).parent / "out.json")])
    after = json.loads((Path(file).parent / "out.json").read_text())["asked"]["peaks"]["training"]
    assert code == 0 and after != before


def test_responses_of_a_ranking(planned, config):
    two, four = (planned("--config", config("reward"), f"--responses={n}")[1]["asked"] for n in (2, 4))
    assert (two["tree_tokens"], four["tree_tokens"]) == (6 + 2 * 4, 6 + 4 * 4) and four["peak"] > two["peak"]


def test_nodes_and_table(planned, config):
    code, found = planned("--config", config("sft", data={"batch_size": 16}), "--devices=2", "--nodes=2", "--table")
    assert code == 0 and found["asked"]["micro_prompts"] == 4
    assert {(t["strategy"], t["precision"]) for t in found["table"]} == {
        (s, p) for s in ("single", "ddp", "fsdp") for p in ("32-true", "bf16-mixed", "bf16-true")
    }
    peaks = {(t["strategy"], t["precision"]): t["peak"] for t in found["table"]}
    assert peaks["fsdp", "32-true"] < peaks["ddp", "32-true"] and peaks["ddp", "bf16-true"] < peaks["ddp", "32-true"]


# No weights, and what is refused


def test_no_weights_are_read(planned, config, directory):
    (Path(directory) / "model.safetensors").write_bytes(b"not a safetensors file")
    assert planned("--config", config("ppo"))[0] == 0


def test_a_stage_that_has_not_run_yet(planned, config):
    code, found = planned("--config", config("ppo", model={"reward_model": "runs/never/made/hf"}))
    assert code == 0 and found["parameters"]["reward"]["all"] == SCALAR
    assert any("runs/never/made/hf is not there yet" in note for note in found["notes"])


@pytest.mark.parametrize("given", ["80 apples", "GiB", "-1GiB", "1.2.3GB", "0GiB", ""])
def test_bad_device_memory(given, config, capsys):
    assert "give a number and a unit such as 80GiB" in refused(capsys, "--config", config("sft"), f"--device_memory={given}")


def test_units():
    # 80 x 1024^3, 24 x 1000^3, 512 x 1024^2
    assert [parse_bytes(x) for x in ("80GiB", "24 GB", "512MiB", "7")] == [85899345920, 24e9, 536870912, 7]


def test_refusals(config, directory, capsys, tmp_path):
    assert "no_such" in refused(capsys, "--config", config("sft", model={"no_such": 1}))
    assert "no model directory" in refused(capsys, "--config", config("sft", model={"model": "runs/none/sft/hf"}))
    assert "not trainer.precision '64-true'" in refused(capsys, "--config", config("sft", trainer={"precision": "64-true"}))
    assert "not trainer.strategy 'dp'" in refused(capsys, "--config", config("sft", trainer={"strategy": "dp"}))
    assert "DeepSpeed is not supported" in refused(capsys, "--config", config("sft", trainer={"strategy": "deepspeed"}))
    assert "cannot be split" in refused(capsys, "--config", config("sft"), "--devices=64")
    assert "--rows must be above 0" in refused(capsys, "--config", config("sft"), "--rows=0")
    assert "both must be at least 1" in refused(capsys, "--config", config("sft"), "--devices=0")
    t5 = tmp_path / "t5"
    t5.mkdir()
    (t5 / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    assert "encoder-decoder" in refused(capsys, "--config", config("sft", model={"model": str(t5)}))
    (t5 / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    assert "no_such_family" in refused(capsys, "--config", config("sft", model={"model": str(t5)}))


def test_the_help_names_plan(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "lit-rlhf plan" in " ".join(capsys.readouterr().out.split())


def test_the_tutorial_shows_what_the_tool_says(tmp_path, monkeypatch):
    folder = Path(__file__).parents[1] / "tutorials"
    monkeypatch.syspath_prepend(str(folder / "memory"))
    from tables import planned

    page = (folder / "memory.md").read_text(encoding="utf-8")
    said = [line.rstrip() for line in planned("135M", tmp_path).splitlines() if line.strip()]
    shown = [line for line in said if not line.startswith("Give --device_memory")]
    assert len(shown) > 15 and [line for line in shown if line not in page.splitlines()] == []


def test_a_shell_holds_no_numbers(directory):
    from types import SimpleNamespace

    from lit_rlhf.planning.shells import build, read_source

    args = SimpleNamespace(
        dropout=False, dtype="float32", attn_implementation=None, peft=None, frozen_layers=0, activation_checkpointing=False
    )
    with FakeTensorMode():
        shells = build(SimpleNamespace(stage="sft", model=args), {"policy": read_source(directory, None, False)})
    storage = next(shells.policy.parameters()).untyped_storage()
    assert storage.device.type == "meta"
