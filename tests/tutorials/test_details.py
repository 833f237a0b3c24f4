"""The details laboratory: each patch breaks what it says, each setting reaches the run, and the default is the quickstart's."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_rlhf import cli, generation, rollout, scoring
from lit_rlhf.batch import Batch
from lit_rlhf.modules import ppo
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.quickstart.model import train_tokenizer, write_untrained
from lit_rlhf.quickstart.run import quiet, sft_texts, stage_command
from lit_rlhf.quickstart.world import write_data
from lit_rlhf.rollout import Rollout, Shaping

FOLDER = Path(__file__).parents[2] / "tutorials" / "details"
SCRIPTS = ("broken", "variants", "laboratory", "page")
MORE = [
    "--trainer.max_epochs=2",
    "--model.init_args.batch_size=16",
    "--model.init_args.sampling.max_new_tokens=8",
    "--model.init_args.optimizer.init_args.lr=1e-2",  # so that in two iterations every clip is reached
]


@pytest.fixture(scope="module")
def broken(scripts):
    return scripts["broken"]


# Each patch: a value worked by hand


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def test_the_penalty_has_the_other_sign(broken):
    """-0.5 * (-1 - -3) + 5 = 4; with the sign flipped +0.5 * 2 + 5 = 6."""
    arguments = (row(-1.0), row(-3.0), torch.tensor([5.0]), row(1) > 0)
    assert float(rollout.token_rewards(*arguments, kl_coef=0.5)) == 4
    with broken.kl_sign_flipped():
        assert float(rollout.token_rewards(*arguments, kl_coef=0.5)) == 6
    assert float(rollout.token_rewards(*arguments, kl_coef=0.5)) == 4


def test_the_penalty_is_k3(broken):
    """log p - log q = log 2: k1 is 0.6931, k3 is 1/2 - 1 + log 2 = 0.1931; at -log 2 they are -0.6931 and 2 - 1 - log 2 = 0.3069."""
    logprobs, ref = row(math.log(2), -math.log(2)), row(0.0, 0.0)
    arguments = (logprobs, ref, torch.tensor([0.0]), torch.ones(1, 2, dtype=torch.bool))
    with broken.k3_penalty():
        assert rollout.token_rewards(*arguments, kl_coef=1.0)[0].tolist() == pytest.approx([-0.193147, -0.306853], abs=1e-6)
    assert rollout.token_rewards(*arguments, kl_coef=1.0)[0].tolist() == pytest.approx([-0.693147, 0.693147], abs=1e-6)


def test_whitening_counts_the_padding(broken):
    """1, 3, pad, pad: mean 1 and variance (0 + 4 + 1 + 1) / 4 = 1.5 in place of 2 and 1."""
    x, mask = row(1, 3, 0, 0), row(1, 1, 0, 0) > 0
    with broken.whiten_over_padding():
        assert rollout.whiten(x, mask)[0].tolist() == pytest.approx([0, 2 / 1.5**0.5, -1 / 1.5**0.5, -1 / 1.5**0.5], abs=1e-6)
    assert rollout.whiten(x, mask)[0].tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-6)


def test_whitening_adds_the_mean_back(broken):
    """0, 4: mean 2, standard deviation 2: -1, 1 whitened; 1, 3 with the mean back."""
    with broken.whiten_keeps_mean():
        assert rollout.whiten(row(0, 4), row(1, 1) > 0)[0].tolist() == pytest.approx([1, 3], abs=1e-6)


def made(ids, finished, values, scores):
    """A Rollout without KL; all tokens count."""
    n, zero = len(ids), torch.zeros(len(ids), len(ids[0]))
    batch = Batch.of([[9]] * n, ids)
    return Rollout(batch, [""] * n, torch.tensor(finished), zero, zero, zero, torch.tensor(values), zero, torch.tensor(scores))


def test_the_returns_are_those_of_whitened_advantages(broken):
    """Values 0, 1 and a score of 2 at the end: A = (2, 1), returns (2, 2). Whitened, A = (1, -1): the wrong returns are (1, 0)."""
    arguments = (made([[5, 1]], [True], [[0.0, 1.0]], [2.0]), 0.1, Shaping(lam=1.0))
    assert ppo.shape(*arguments)[0].returns[0].tolist() == [2, 2]
    with broken.returns_of_whitened():
        assert ppo.shape(*arguments)[0].returns[0].tolist() == pytest.approx([1, 0], abs=1e-6)


def test_pad_is_eos_takes_the_eos_out_of_the_mask(broken):
    """Row 0 ends in EOS, row 1 does not end, row 2 is nothing but EOS; scores 2, 3, 4 move to the token before the EOS."""
    rollout_ = made([[5, 6, 1], [7, 8, 9], [1]], [True, False, True], [[0.5] * 3, [0.5] * 3, [0.5, 0, 0]], [2.0, 3.0, 4.0])
    right, _ = ppo.shape(rollout_, 0.1, Shaping(whiten_advantages=False))
    assert right.rewards.tolist() == [[0, 0, 2], [0, 0, 3], [4, 0, 0]]
    with broken.pad_is_eos():
        wrong, _ = ppo.shape(rollout_, 0.1, Shaping(whiten_advantages=False))
    assert wrong.batch.response_mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert wrong.rewards.tolist() == [[0, 2, 0], [0, 0, 3], [4, 0, 0]]
    assert wrong.values.tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0.5], [0.5, 0, 0]]
    assert wrong.returns[0, 2] == 0 == wrong.advantages[0, 2]


def test_top_k_draws_from_k_tokens(broken):
    """Equal logits but for a banned id, which is the largest: all others are drawn, with k = 2 and 1, 2 the largest, these two."""
    logits, banned = torch.tensor([0.0, 0.2, 0.1, 0.0, 9.0]).repeat(400, 1), torch.arange(5) == 4
    rows = torch.arange(400, dtype=torch.int32)
    assert set(generation.draw(logits, banned, 1.0, (0,), rows)[0].tolist()) == {0, 1, 2, 3}
    with broken.top_k(2)():
        token, logprob, _ = generation.draw(logits, banned, 1.0, (0,), rows)
    assert set(token.tolist()) == {1, 2}
    odds = math.exp(0.2) / (math.exp(0.2) + math.exp(0.1))
    assert math.exp(float(logprob[token == 1][0])) == pytest.approx(odds, abs=1e-6)


def test_logprobs_ignore_the_temperature(broken, sft_dir):
    policy, batch = CausalPolicy.load(sft_dir).eval(), Batch.of([[5, 6]], [[7, 8]])
    with torch.no_grad():
        cold, plain = policy(batch, temperature=0.5)[0], policy(batch, temperature=1.0)[0]
        with broken.logprobs_without_temperature():
            wrong = policy(batch, temperature=0.5)[0]
    assert torch.equal(wrong, plain) and not torch.allclose(cold, plain)


def test_the_score_is_read_before_the_eos(broken, reward_dir):
    network = ScalarModel.load(reward_dir).eval()
    scorer, texts = scoring.ModelScorer(network), (["the cat", "a"], [" sat on", ""])
    with torch.no_grad():
        states = network(scoring.text_batch(network.tokenizer, *texts))
    right = scorer(*texts, {})
    with broken.scored_without_eos():
        wrong = scorer(*texts, {})
    length = int(scoring.text_batch(network.tokenizer, *texts).response_mask[0].sum())
    torch.testing.assert_close(right[0], states[0, length], atol=1e-5, rtol=0)
    torch.testing.assert_close(wrong[0], states[0, length - 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(wrong[1], right[1], atol=1e-5, rtol=0)  # an empty response keeps its EOS


def test_losses_as_loops_over_rows(broken):
    """Two responses at ratio 1, A = 4 and (1, 1, 1): -7/4 over tokens; -(4 + 1)/2 over rows; ((-4)/2 - 1)/2 = -1.5 divided in the loop.

    Values 0 for returns 2 and (0, 2, 4): half squares 2 and (0 + 2 + 8)/3 = 10/3; 12/4 = 3, (2 + 10/3)/2 = 8/3, (2/2 + 10/3)/2 = 13/6.
    """
    mask = torch.tensor([[True, False, False], [True, True, True]])
    zero, advantages = torch.zeros(2, 3), torch.tensor([[4.0, 0, 0], [1, 1, 1]])
    returns = torch.tensor([[2.0, 0, 0], [0, 2, 4]])

    def losses():
        policy, stats = ppo.policy_loss(zero, zero, advantages, mask, clip=0.2, count=4)
        value, _ = ppo.value_loss(zero, zero, returns, mask, clip=None, count=4)
        return [float(policy), float(value), float(stats["policy_loss"])]

    assert losses() == pytest.approx([-1.75, 3, -1.75])
    with broken.mean_of_means():
        assert losses() == pytest.approx([-2.5, 8 / 3, -1.75])
    with broken.divided_in_loop():
        assert losses() == pytest.approx([-1.5, 13 / 6, -1.75])


# In whole runs of two iterations


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """What a quickstart leaves before PPO, its networks untrained; EOS is likelier than other tokens, so that some responses end."""
    path = tmp_path_factory.mktemp("quick")
    write_data(path / "data", 0, {"sft_train": 64, "prompts_train": 32, "prompts_valid": 4, "held_out": 6})
    write_untrained(path / "init", train_tokenizer(sft_texts(path / "data" / "sft_train.jsonl")), 0)
    weights = load_file(path / "init" / "model.safetensors")
    weights["model.embed_tokens.weight"][1] *= 10
    save_file(weights, path / "init" / "model.safetensors", {"format": "pt"})
    shutil.copytree(path / "init", path / "sft" / "hf")
    torch.manual_seed(1)
    reward = ScalarModel.load(str(path / "init"), head="new")
    reward.set_mean(0.5)
    reward.save(path / "reward" / "hf")
    return path


@pytest.fixture(scope="module")
def run(scripts, quick, tmp_path_factory):
    """run(name) -> (the variant's weights as one vector, its diary)."""
    work = tmp_path_factory.mktemp("work")
    variants = {v.name: v for v in scripts["variants"].VARIANTS}

    def run(name: str):
        policy, diary, stopped = scripts["laboratory"].train(variants[name], quick, 0, work, MORE)
        assert stopped is None and len(diary.rows) == 2
        return torch.cat([p.detach().flatten() for p in policy.parameters()]), diary

    with quiet():
        yield run


@pytest.fixture(scope="module")
def default(run):
    return run("default")


def test_the_default_is_the_quickstarts_ppo_bit_for_bit(scripts, run, default, quick, tmp_path):
    assert cli.main(stage_command("ppo", quick, 0, MORE)) == 0
    theirs = CausalPolicy.load(str(quick / "ppo" / "hf" / "policy"))
    assert torch.equal(default[0], torch.cat([p.detach().flatten() for p in theirs.parameters()]))
    theirs.save(tmp_path)
    assert scripts["laboratory"].same_weights(tmp_path, quick / "ppo" / "hf" / "policy")
    assert not scripts["laboratory"].same_weights(tmp_path, quick / "sft" / "hf")


def variant_names() -> list[Any]:
    """Those that are patches; the settings too where slow tests run."""
    sys.path.insert(0, str(FOLDER))
    try:
        import variants

        changed = [v for v in variants.VARIANTS if v is not variants.DEFAULT]
        return [pytest.param(v.name, marks=[pytest.mark.slow] if v.args else []) for v in changed]
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("variants", "broken"):
            sys.modules.pop(name)


@pytest.mark.parametrize("name", variant_names())
def test_every_variant_changes_the_policy(name, run, default):
    assert 0 < default[1].rows[0]["rollout/eos_rate"] < 1
    weights, _ = run(name)
    assert weights.shape == default[0].shape and not torch.equal(weights, default[0])


def test_no_patch_outlives_its_run(run, default):
    run("dropout"), run("temperature")
    assert torch.equal(run("default")[0], default[0])


GIVEN_AWAY = {"temperature": "rollout/sampling_gap_max", "top-k": "rollout/sampling_gap_max", "dropout": "ppo/ratio_max_dev"}


@pytest.mark.parametrize("name", GIVEN_AWAY)
def test_what_gives_a_broken_sampler_away_at_the_first_update(name, run, default):
    assert default[1].rows[0][GIVEN_AWAY[name]] < 1e-4
    assert run(name)[1].rows[0][GIVEN_AWAY[name]] > 0.05


def test_the_value_network_reads_one_token_late(broken, quick):
    module = ppo.PPO(str(quick / "sft" / "hf"), reward_model=str(quick / "reward" / "hf"))
    module._trainer = None
    batch = Batch.of([[5, 6]], [[7, 8, 9]])
    with broken.value_sees_action():
        module.configure_model()
    with torch.no_grad():
        right = ScalarModel.load(str(quick / "reward" / "hf"))(batch)
        wrong = module.value(batch)
    torch.testing.assert_close(wrong[:, :-1], right[:, 1:], atol=1e-5, rtol=0)


# Results and the page


def test_what_has_a_result_is_not_run_again(scripts, quick, tmp_path, monkeypatch, capsys):
    laboratory = scripts["laboratory"]
    train = laboratory.train
    monkeypatch.setattr(laboratory, "train", lambda *args: train(*args, MORE))
    arguments = [str(tmp_path), str(quick), "--only", "default", "no-kl"]
    laboratory.main(arguments)
    printed = capsys.readouterr().out
    assert "default, seed 0" in printed and "no-kl, seed 0" in printed
    found = json.loads((tmp_path / "no-kl.0.json").read_text())
    assert len(found["gold"]) == len(found["kl"]) == len(found["texts"]) == 6 and found["stopped"] is None
    assert len(json.loads((tmp_path / "sft.0.json").read_text())["gold"]) == 6
    laboratory.main(arguments)
    assert "seed 0" not in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["default.0.json", "no-kl.0.json", "sft.0.json"]


def written(work, name, seed, gold, **more):
    """A result of two posts."""
    content = {
        "variant": name,
        "seed": seed,
        "gold": gold,
        "kl": [1.0, 2.0],
        "scores": [0.0, 0.0],
        "lengths": [3, 5],
        "texts": [name, "b"],
    } | more
    if name != "sft":
        first = {"rollout/sampling_gap_max": 1e-6, "ppo/ratio_max_dev": 1e-6, "rollout/kl": -1e-6}
        content = {"stopped": None, "collapsed": None, "diary": [first | more.get("first", {})]} | content
    (work / f"{name}.{seed}.json").write_text(json.dumps(content))


def test_findings_by_hand(scripts, tmp_path):
    """Two seeds. The default again differs by 0.1, -0.1, 0.3 and 0.1: noise sqrt(0.12 / 4) = 0.1732; over root 2 no error is below it."""
    page = scripts["page"]
    for seed in (0, 1):
        written(tmp_path, "sft", seed, [1.0, 2.0])
        written(tmp_path, "default", seed, [3.0, 4.0])
        written(tmp_path, "no-kl", seed, [3.5, 4.7])  # differs by 0.6 on both seeds: the error is the noise's, 0.1225; 4.9 errors
        written(
            tmp_path, "adam-eps", seed, [[2.8, 4.0], [3.0, 4.4]][seed], texts=["default", "b"]
        )  # -0.1, 0.2: sd 0.2121 is above the noise, error 0.15
        written(tmp_path, "gamma", seed, [2.0, 3.0])  # -1 on both, 0.5 below which is SFT
        written(tmp_path, "kl-sign", seed, [-3.0, 0.0], collapsed=None)  # -5, and below SFT
        written(tmp_path, "dropout", seed, [2.5, 3.5], first={"ppo/ratio_max_dev": 0.25})
    for name, differences in (("again-1", (0.1, -0.1)), ("again-2", (0.3, 0.1))):
        for seed, d in enumerate(differences):
            written(tmp_path, name, seed, [3.0 + d, 4.0 + d])
    rows = page.read(tmp_path)
    assert page.noise(rows) == pytest.approx(0.03**0.5)
    found = {f.variant.name: f for f in page.findings(rows)}
    assert list(found) == ["again-1", "no-kl", "kl-sign", "dropout", "gamma", "adam-eps"]
    assert {name: f.verdict for name, f in found.items()} == {
        "again-1": "no difference seen",
        "no-kl": "gains",
        "kl-sign": "breaks",
        "dropout": "costs",
        "gamma": "costs",
        "adam-eps": "no difference seen",
    }
    assert (found["no-kl"].difference, found["no-kl"].error) == pytest.approx((0.6, 0.03**0.5 / 2**0.5))
    assert (found["adam-eps"].difference, found["adam-eps"].error) == pytest.approx((0.05, 0.15))
    assert found["again-1"].difference == pytest.approx(0.1)
    assert (found["no-kl"].kl, found["no-kl"].length, found["no-kl"].gold) == pytest.approx((1.5, 4, 4.1))
    assert found["dropout"].signs == "ratio off 1 by up to 0.25" and found["gamma"].signs == ""
    assert found["adam-eps"].signs == "the default's texts to the letter"
    assert page.judge(1.0, 2.0, 0.1, ended=True) == "breaks"
    assert {f.variant.name for f in page.findings(rows)} == set(page.bars(list(found.values())).names) - {"again"} | {"again-1"}


def test_the_page_is_what_its_results_say(scripts, tmp_path, monkeypatch):
    page = scripts["page"]
    copy = tmp_path / "details.md"
    shutil.copy(page.PAGE, copy)
    shutil.copytree(FOLDER, tmp_path / "details", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(page, "PAGE", copy)
    monkeypatch.setattr(page, "HERE", tmp_path / "details")
    page.main([])
    assert copy.read_text() == (FOLDER.parent / "details.md").read_text()
    for name in ("gold.svg", "frontier.svg"):
        assert (tmp_path / "details" / name).read_text() == (FOLDER / name).read_text()
