"""The command on tiny networks: what it leaves, that it goes on after a kill at any point with the same numbers, what it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_rlhf import cli
from lit_rlhf.iterate import evaluation, fits, run, sampling
from lit_rlhf.iterate.rounds import Round, read_rows
from lit_rlhf.modules import PPO, PairwiseReward
from lit_rlhf.networks import CausalPolicy

TRAINER = ["accelerator=cpu", "logger=false", "enable_progress_bar=false", "enable_model_summary=false", "num_sanity_val_steps=0"]
FIT = [f"trainer.{word}" for word in TRAINER] + ["model.optimizer=torch.optim.SGD", "model.optimizer.lr=0.1"]
PROMPTS = ["data=PromptDataModule", "data.data=prompts.jsonl"]
WORDS = "cat sat hat mat rat".split()


@pytest.fixture
def command(sft_dir, tmp_path, monkeypatch):
    """The arguments of two rounds with an exact reward, two reward models and active choice; fits run in this process."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"the {WORDS[i % 5]} and {WORDS[i // 5]}", "label": f" {WORDS[(i + 2) % 5]} ran"} for i in range(20)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("iterate_gold.py").write_text("def vowels(prompts, responses):\n    return [sum(c in 'aeiou' for c in r) for r in responses]\n")
    monkeypatch.setattr(run, "in_a_process", lambda argv: run.main(argv))
    monkeypatch.setattr(fits, "REWARD_STEPS", 1)
    reward = ["--reward", "model=PairwiseReward", "data=PairwiseDataModule", "data.batch_size=4", "trainer.max_epochs=1", *FIT]
    ppo = ["--ppo", "model=PPO", "data=PromptDataModule", "data.data=prompts.jsonl", "data.val_data=prompts.jsonl", "trainer.max_epochs=2"]
    ppo += ["model.batch_size=4", "model.ppo_epochs=1", "model.sampling.max_new_tokens=6", "model.collapse_patience=null", *FIT]
    more = ["--gold=iterate_gold.vowels", f"--zero_shot={sft_dir}", "--rounds=2", "--prompts=10", "--members=2", "--choose=disputed"]
    return [f"--sft={sft_dir}", *reward, *ppo, *more]


def files(out: str) -> dict[str, bytes]:
    """Everything whose numbers must be the same: what was sampled, chosen, labelled and measured, and the weights."""
    found = [p for p in Path(out).rglob("*") if p.suffix in (".jsonl", ".safetensors") or p.name == "evaluation.json"]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in found}


def test_two_rounds(command, capsys, tokenizer):
    assert run.main([*command, "--out=out"]) == 0
    said = capsys.readouterr().out
    assert "round 1: 10 of 10 pairs labelled; reward model right on" in said and "the round before's on" in said
    first, second = (read_rows(Path(f"out/round-{n}/responses.jsonl")) for n in (1, 2))
    assert {p for row in first for p, _ in row["responses"]} == {"zero-shot", "sft", "reference"}
    assert {p for row in second for p, _ in row["responses"]} == {"zero-shot", "sft", "current", "reference"}
    assert not {row["row"] for row in first} & {row["row"] for row in second}  # 20 prompts, 10 a round
    for row in first:
        assert [text for policy, text in row["responses"] if policy == "reference"] == [row["columns"]["reference"]]
        assert len({text.strip() for _, text in row["responses"]}) == len(row["responses"])
    labels = [row for n in (1, 2) for row in read_rows(Path(f"out/round-{n}/labels.jsonl"))]
    vowels = lambda text: sum(text.count(v) for v in "aeiou")  # noqa: E731
    for row in labels:
        margin = vowels(row["first"]) - vowels(row["second"])
        assert row["preferred"] == (0.5 if margin == 0 else float(margin > 0))
    assert sum(row["held_out"] for row in labels) == 4  # a fifth of the prompts
    assert (
        sum(len(row["pairs"]) for row in read_rows(Path("out/round-2/comparisons.jsonl"))) == 16
        and len(read_rows(Path("out/round-2/held_out.jsonl"))) == 4
    )
    held = {row["prompt"] for row in labels if row["held_out"]}
    assert not held & {row["prompt"] for row in labels if not row["held_out"]}
    report = json.loads(Path("out/report.json").read_text())
    assert [one["labels"]["answered"] for one in report["rounds"]] == [10, 10]
    assert "PPO by round" in Path("out/report.html").read_text()
    check_accuracy_and_choice_by_transformers_alone(tokenizer)
    check_what_ppo_learns_from(tokenizer)
    check_the_score_of_a_round(run._parser().parse_args([*command, "--out=out"]))


def score(where: str, prompt: str, response: str, tokenizer) -> float:
    """By transformers alone: the reward model's raw score of prompt + response + EOS."""
    model = AutoModelForSequenceClassification.from_pretrained(where)
    ids = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def check_accuracy_and_choice_by_transformers_alone(tokenizer):
    evaluation = json.loads(Path("out/round-2/evaluation.json").read_text())
    earlier, refitted = ([f"out/round-{n}/reward-{m}/hf" for m in (0, 1)] for n in (1, 2))
    for models, name, number in (
        (earlier, evaluation["before"], 2),
        (refitted, evaluation["after"]["2"], 2),
        (refitted, evaluation["after"]["1"], 1),
    ):
        rows = [r for r in read_rows(Path(f"out/round-{number}/labels.jsonl")) if r["held_out"] and r["preferred"] != 0.5]
        margins = [
            sum(score(m, r["prompt"], r["first"], tokenizer) - score(m, r["prompt"], r["second"], tokenizer) for m in models) for r in rows
        ]
        assert name == [(margin > 0) == (row["preferred"] > 0.5) for margin, row in zip(margins, rows, strict=True)]
    # round 2 asked about the pairs with the largest spread of round 1's two models: |sigmoid(d0) - sigmoid(d1)| / 2
    rows = read_rows(Path("out/round-2/responses.jsonl"))[2:]
    spreads, sure = {}, lambda d: 1 / (1 + math.exp(-d))  # noqa: E731
    for row in rows:
        texts = [text for _, text in row["responses"]]
        raw = [[score(m, row["prompt"], text, tokenizer) for text in texts] for m in earlier]
        for i in range(len(texts)):
            for j in range(i):
                spreads[row["prompt"], *sorted((texts[i], texts[j]))] = abs(sure(raw[0][i] - raw[0][j]) - sure(raw[1][i] - raw[1][j])) / 2
    chosen = [r for r in read_rows(Path("out/round-2/pairs.jsonl")) if not r["held_out"]]
    found = [spreads[r["prompt"], *sorted((r["first"], r["second"]))] for r in chosen]
    assert found == pytest.approx(sorted(spreads.values(), reverse=True)[:8], abs=1e-5) and found[0] > 2 * min(spreads.values())


def check_what_ppo_learns_from(tokenizer):
    """Both members: the mean of their scores, each about the mean of its preferred responses, less their standard deviation."""
    ppo = cli.build(fits.read_done(Path("out/round-2/ppo"))["args"]).model
    members = [f"out/round-2/reward-{m}/hf" for m in (0, 1)]
    assert ppo.reward_model is None and ppo.value_init == members[0] and ppo.shaping.no_eos_score == -1.0
    means = [AutoModelForSequenceClassification.from_pretrained(m).config.reward_mean for m in members]
    prompts, responses = ["the cat and sat", "the hat and mat"], [" hat ran", " rat"]
    found = ppo.reward_fn(prompts, responses)
    for prompt, response, value in zip(prompts, responses, found, strict=True):
        one, other = (score(m, prompt, response, tokenizer) - mean for m, mean in zip(members, means, strict=True))
        assert abs(one - other) > 1e-4 and value == pytest.approx((one + other) / 2 - abs(one - other) / 2, abs=1e-4)


def check_the_score_of_a_round(options):
    """SFT's responses are the same whoever scores them: the round's scores are the members' mean less half their difference."""
    made = sampling.prepared(fits.sampling_command(options))
    sft = CausalPolicy.load(options.sft, tokenizer=made.model.tokenizer).eval()
    members = [f"out/round-2/reward-{m}/hf" for m in (0, 1)]
    one, other = (evaluation.measure(made, options.sft, sft, member, None, (options.seed,))["score"] for member in members)
    found = json.loads(Path("out/round-2/evaluation.json").read_text())["policies"]["SFT"]["score"]
    assert found == pytest.approx([(a + b) / 2 - abs(a - b) / 2 for a, b in zip(one, other, strict=True)], abs=1e-5)
    assert found != pytest.approx(one, abs=1e-5)


def test_an_ensemble_leaves_ppo_s_own_choices(command):
    """value_init and no_eos_score, where PPO's settings name them, are those of its run."""
    settings = [word for word in command if word != "model=PPO"]
    settings[settings.index("--ppo") + 1 : settings.index("--ppo") + 1] = [
        "model=PPO",
        "model.value_init=sft",
        "model.no_eos_score=-3",
        "model.dtype=bfloat16",
    ]
    options = run._parser().parse_args([*settings, "--out=out", "--spread_coef=0.5"])
    now = Round(options.out, 1)
    for member in (0, 1):
        shutil.copytree(options.sft, now.reward(member) / "hf")
    built = cli.build(fits.ppo_command(options, now))
    ppo, reward = built.model, built.model.reward_fn
    assert type(reward).__name__ == "RewardEnsemble" and (reward.spread_coef, reward.dtype) == (0.5, "bfloat16")
    assert ppo.value_init == "sft" and ppo.shaping.no_eos_score == -3.0
    assert "RewardParts" in [type(callback).__name__ for callback in built.trainer.callbacks]


def broken(monkeypatch, owner, name: str, at: int):
    """The `at`-th call of owner.name raises as if the power were gone; later calls work."""
    before, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt("the power is gone")
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_killed_anywhere_it_goes_on_with_the_same_numbers(command, monkeypatch):
    assert run.main([*command, "--out=whole"]) == 0
    whole = files("whole")
    assert len(whole) == 20  # a round: five files of rows, evaluation.json, two reward models, policy and value network
    points = [
        (sampling, "sample", 2),  # within round 1's sampling
        (run, "choose", 1),
        (PairwiseReward, "training_step", 2),  # of the first reward model, one step of which is in a checkpoint
        (PPO, "training_step", 2),  # of the second iteration of round 1, the first being in a checkpoint
        (run, "evaluate", 1),
        (run.labels, "label", 1),  # round 2
        (run, "write_comparisons", 1),
        (PairwiseReward, "training_step", 5),  # of the second member
        (PPO, "training_step", 1),
        (run, "evaluate", 1),
        (run, "publish", 1),
    ]
    for owner, name, at in points:
        with monkeypatch.context() as patch:
            broken(patch, owner, name, at)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                assert run.main([*command, "--out=cut"]) == 0
                pytest.fail(f"{name} was not called {at} times")
        if (owner, at) == (PPO, 2):
            assert Path("cut/round-1/ppo/checkpoints/last.ckpt").is_file()  # from which it goes on
    assert run.main([*command, "--out=cut"]) == 0
    cut = files("cut")
    assert sorted(cut) == sorted(whole)
    assert [name for name in whole if whole[name].replace(b"whole/", b"cut/") != cut[name]] == []


def test_what_is_made_is_not_made_again_and_rounds_may_grow(command, monkeypatch, capsys):
    assert run.main([*command, "--rounds=1", "--out=out"]) == 0
    before = files("out")
    with monkeypatch.context() as patch:
        patch.setattr(run, "in_a_process", lambda argv: pytest.fail("it ran again"))
        patch.setattr(run, "prepared", lambda args: pytest.fail("it was prepared again"))
        assert run.main([*command, "--rounds=1", "--out=out"]) == 0
    assert run.main([*command, "--out=out"]) == 0
    after = files("out")
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    capsys.readouterr()
    assert run.main([*command, "--out=out", "--seed=1"]) == 2
    assert "out was made with --seed 0; give the same, or another --out" in capsys.readouterr().err


def test_people_label(command, capsys):
    args = [arg for arg in command if not arg.startswith(("--gold", "--rounds", "--zero"))] + ["--people", "--rounds=1", "--out=out"]
    assert run.main(args) == 3
    assert "round 1 waits for labels: fill in `preferred`" in capsys.readouterr().out
    assert run.main(args) == 3 and not Path("out/round-1/labels.jsonl").exists()
    rows = read_rows(Path("out/round-1/to_label.jsonl"))
    filled = [row | {"preferred": "second"} for row in rows]
    Path("out/round-1/labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filled))
    assert run.main(args) == 0
    kept = read_rows(Path("out/round-1/comparisons.jsonl"))
    seconds = [row["second"] for row in rows]
    chosen = [row["responses"][i] for row in kept for i, _ in row["pairs"]]
    assert len(chosen) == 8 and set(chosen) <= set(seconds) and all(row["target"] == [1.0] * len(row["pairs"]) for row in kept)
    report = json.loads(Path("out/report.json").read_text())
    assert report["rounds"][0]["gain"]["gold"] is None and report["rounds"][0]["gain"]["score"] is not None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sft=./nowhere"], "no model directory at './nowhere'"),
        (["--prompts=21"], "--prompts is 21, but the data of --ppo has 20 prompts"),
        (["--held_out=1"], "--held_out is 1.0 of 10 prompts"),
        (["--members=1"], "--choose disputed asks where reward models disagree: give --members 2"),
        (["--spread_coef=-1"], "--spread_coef must be 0 or more, got -1.0"),
        (
            ["--ppo", "model=PPO", *PROMPTS, "model.reward_baseline=none"],
            "--ppo sets reward_baseline: none, but each of --members 2 subtracts its own mean",
        ),
        (["--care=0"], "--care goes with --gold, and must be above 0"),
        (["--rounds=0"], "--rounds must be at least 1"),
        (["--gold=iterate_gold.none"], "the module iterate_gold has no 'none'"),
        (["--reward", "model=SFT", "data=SFTDataModule"], "--reward configures a SFT; give the YAML file of a PairwiseReward"),
        (["--ppo", "model=SFT", "data=SFTDataModule", "data.data=prompts.jsonl"], "reward_model"),
        (["--comparisons=none.jsonl"], "none.jsonl"),
    ],
)
def test_refuses_in_one_line(command, capsys, more, said):
    assert run.main([*command, *more, "--out=out"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert said in err[0] and err[0].startswith("lit-rlhf: error: ")


def test_neither_noise_nor_choice_depends_on_the_batches(command, sft_dir, monkeypatch):
    made = []
    for size in (256, 3):
        monkeypatch.setattr(sampling, "MAX_ROWS", size)
        prepared = sampling.prepared(fits.sampling_command(run._parser().parse_args([*command, "--out=out"])))
        made.append(sampling.respond(prepared, {"sft": sft_dir}, [4, 2, 9], 2, (0, 1)))
    assert made[0] == made[1] and [row["row"] for row in made[0]] == [4, 2, 9]


def test_random_pairs_take_every_prompt_once_before_any_twice():
    rows = [{"row": r, "responses": [["sft", str(i)] for i in range(n)]} for r, n in ((7, 3), (3, 2), (5, 1), (6, 4))]
    found = sampling.random_pairs(rows, 99, (0,))
    assert len(found) == len(set(found)) == 3 + 1 + 0 + 6  # n (n - 1) / 2 of each
    assert {m for m, _, _ in found[:3]} == {0, 1, 3} and {m for m, _, _ in found[3:5]} == {0, 3}
    assert sampling.random_pairs(rows, 4, (0,)) == found[:4]


@pytest.mark.parametrize(("total", "size", "apart"), [(20, 10, 2), (11, 10, 2), (10, 10, 3), (23, 5, 0), (7, 4, 1)])
def test_rows_of_the_rounds(total, size, apart):
    """What is held out in one round is never learnt from in another, and every row has its turn before any comes again."""
    rounds = [sampling.round_rows(total, number, size, apart, 0) for number in range(1, 41)]
    held = [row for rows in rounds for row in rows[:apart]]
    learnt = [row for rows in rounds for row in rows[apart:]]
    assert not set(held) & set(learnt) and set(held) | set(learnt) == set(range(total))
    for walk in filter(None, (held, learnt)):
        kinds = len(set(walk))
        assert all(len(set(walk[at : at + kinds])) == kinds for at in range(0, len(walk) - kinds + 1, kinds))
    assert all(len(rows) == len(set(rows)) == size for rows in rounds[:1])
    assert rounds[0] != sampling.round_rows(total, 1, size, apart, 1)
