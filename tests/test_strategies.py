"""Checkpoints, exports, evaluation and uneven work under FSDP2 and FSDP1 on two ranks, against one process."""

import math
from pathlib import Path

import pytest
import torch
from ranks import finish, start
from safetensors.torch import load_file
from strategy_zoo import strategy
from test_two_ranks import STRATEGIES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from two_ranks_checkpoints import AT, KINDS, STEPS, adapted, evaluate, resume, train
from two_ranks_uneven import same_texts

from lit_rlhf.consolidate import consolidate

pytestmark = pytest.mark.slow  # three processes, about 60 s of two idle cores
PLACES = [f"{name}-{'sharded' if sharded else 'whole'}" for name, sharded in KINDS]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dirs(sft_dir, reward_dir) -> tuple[str, str]:
    return sft_dir, reward_dir


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def one(dirs, out) -> torch.Tensor:
    """The weights after one process's run, which leaves out/one.ckpt from its middle, and its export."""
    found = train("one", dirs, out / "one-whole")
    (out / "one.ckpt").symlink_to(out / "one-whole" / f"step={AT}.ckpt")
    return found


@pytest.fixture(scope="module")
def ranks(dirs, out, one) -> list[dict]:
    """What rank 0 and rank 1 found."""
    finish(start(2, [*dirs, str(out)], Path(__file__).parent / "two_ranks_checkpoints.py"), 300)
    return [torch.load(out / f"found.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_adapted(dirs) -> torch.Tensor:
    return adapted("one", dirs)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("place", PLACES)
def test_two_ranks_resume_their_own_checkpoint_from_mid_iteration(ranks, one, place):
    found = ranks[0][place]
    print(f"\n{place}: {gap(found['trained'], one):.1e} from one process")
    assert gap(found["trained"], one) < 1e-5
    assert torch.equal(found["resumed"], found["trained"])


@pytest.mark.parametrize("place", [*PLACES, "ddp"])
def test_two_ranks_go_on_from_one_process_in_mid_iteration(ranks, one, place):
    """Every rank holds the whole experience, so the number of ranks may change at any step."""
    assert gap(ranks[0][place]["from one"], one) < 1e-5


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1"])
def test_one_process_goes_on_from_two_ranks(ranks, one, out, dirs, name):
    assert gap(resume("one", dirs, out / f"{name}-whole" / f"step={AT}.ckpt"), one) < 1e-5


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1"])
def test_one_process_goes_on_from_consolidated_shards(ranks, one, out, dirs, name):
    whole = consolidate(out / f"{name}-sharded" / f"step={AT}.ckpt", out / f"{name}.ckpt")
    saved = torch.load(whole, weights_only=True)
    assert not [key for key in saved["state_dict"] if key.startswith(("reference.", "scorer."))]
    assert gap(resume("one", dirs, whole), one) < 1e-5


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1"])
def test_shards_of_two_ranks_load_on_one_rank(ranks, one, out, dirs, name):
    """Under the same strategy, without consolidating them."""
    path = out / f"{name}-sharded" / f"step={AT}.ckpt"
    try:
        found = resume("one", dirs, path, strategy=strategy(name, world=1, sharded=True))
    finally:
        torch.distributed.destroy_process_group()
    assert gap(found, one) < 1e-5


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("part", ["policy", "value"])
def test_an_export_loads_in_plain_transformers(ranks, one, out, place, part):
    auto = AutoModelForCausalLM if part == "policy" else AutoModelForSequenceClassification
    (model, info), alone = (
        auto.from_pretrained(out / place / "hf" / part, output_loading_info=True),
        auto.from_pretrained(out / "one-whole" / "hf" / part),
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    written = torch.cat([x.flatten() for x in model.state_dict().values()])
    found = ranks[0][place]["trained"]
    assert torch.equal(written, found[: len(written)] if part == "policy" else found[-len(written) :])
    ids = torch.arange(3, 23).view(2, 10)
    assert gap(model(input_ids=ids).logits, alone(input_ids=ids).logits) < 1e-4


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1"])
def test_validate_test_and_predict(ranks, one, out, dirs, name):
    expected = evaluate("one", dirs, out / f"{name}-whole" / f"step={STEPS}.ckpt")
    found = [rank[f"{name}-whole"]["evaluated"] for rank in ranks]
    assert sorted(found[0].pop("rows") + found[1].pop("rows")) == expected.pop("rows")
    assert expected and all(math.isfinite(x) for x in expected.values())
    for rank in found:
        assert rank == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uneven_work_leaves_no_rank_waiting(ranks, strategy):
    """9 prompts with 2 responses each: 8 responses of 1 token by rank 0, 10 of 12 tokens by rank 1; of 7 validation rows rank 0 has 4."""
    first, second = (rank["uneven"][strategy] for rank in ranks)
    assert first["lengths"] == second["lengths"] == [1] * 8 + [12] * 10
    assert (first["val lengths"], second["val lengths"]) == ([1] * 4, [12] * 3)
    assert first["sft"] == second["sft"] == pytest.approx((4 * 1 + 3 * 12) / 7)
    assert first["reward"] == second["reward"]


def test_uneven_work_gives_one_process_texts_and_scores(ranks, dirs):
    alone = same_texts("one", *dirs)
    assert len(set(alone)) > 20
    for rank in ranks:
        for name in STRATEGIES:
            assert rank["uneven texts"][name] == alone


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters(ranks, one_adapted, sft_dir, strategy):
    """LoRA, drawn from the run's seed, trained and merged under every strategy."""
    assert gap(ranks[0]["adapted"][strategy], one_adapted) < 1e-5
    start = load_file(f"{sft_dir}/model.safetensors")
    embeddings, query = start["model.embed_tokens.weight"].flatten(), start["model.layers.0.self_attn.q_proj.weight"].flatten()
    same, moved = one_adapted.split([embeddings.numel(), len(one_adapted) - embeddings.numel()])
    assert torch.equal(same, embeddings) and gap(moved[: query.numel()], query) > 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_precision(ranks, strategy):
    """bfloat16 rounds to 1 in 256; a rollout computes the log-probs that the first minibatch does, in every precision.

    (FSDP1's bf16-mixed is autocast on GPUs alone, so on a CPU it is float32.)
    """
    found = {precision: ranks[0]["precision"][f"{strategy} {precision}"] for precision in ("32-true", "bf16-mixed", "bf16-true")}
    print(f"\n{strategy}: {found}")
    exact = found["32-true"]["loss"]
    assert exact == pytest.approx(ranks[0]["precision"]["ddp 32-true"]["loss"], abs=1e-5)
    for precision in ("bf16-mixed", "bf16-true"):
        assert abs(found[precision]["loss"] - exact) < exact / 256
        assert found[precision]["loss"] != exact or (strategy, precision) == ("fsdp1", "bf16-mixed")
    assert all(numbers["away"] <= 2**-8 for numbers in found.values())
