"""The command on tiny networks: what it leaves, what it does not do twice, and that an interrupted run goes on."""

import json
import shutil

import pytest
import torch

from lit_rlhf.frontier import runs
from lit_rlhf.frontier.points import Points, read_points
from lit_rlhf.frontier.run import main
from lit_rlhf.frontier.sweep import settings
from lit_rlhf.networks import CausalPolicy


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """Vowels, less length."""
    return [sum(c in "aeiou" for c in r) - 0.1 * len(r) for r in responses]


@pytest.fixture
def rest(sft_dir, reward_dir, tmp_path, monkeypatch):
    """The arguments of a PPO run of four iterations."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "the cat sat"}, {"prompt": "my dog"}, {"prompt": "it ran far away"}, {"prompt": "rain and hat"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = [f"--model.model={sft_dir}", f"--model.reward_model={reward_dir}", "--model.batch_size=8", "--model.ppo_epochs=1"]
    more = ["--model.sampling.max_new_tokens=6", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"]
    data = ["--data=PromptDataModule", "--data.data=prompts.jsonl", "--data.val_data=prompts.jsonl"]
    trainer = ["--trainer.max_epochs=4", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    return ["--model=PPO", *model, *more, *data, *trainer]


def run(rest, folder, sweep="kl_coef=0,0.5", every=1):
    """Every setting of the sweep, in this process."""
    for setting in settings([sweep]):
        runs.run_setting(rest, setting, folder / setting.folder, gold, every)


def test_points_and_the_best_policy(rest, tmp_path, sft_dir):
    run(rest, tmp_path / "out", every=2)
    points = read_points(tmp_path / "out/kl_coef=0.5/points.jsonl")
    assert [p.iteration for p in points] == [0, 2, 4]
    assert all(len(getattr(p, name)) == 4 for p in points for name in ("kl", "proxy", "gold", "length", "finished"))
    assert max(map(abs, points[0].kl)) < 1e-5 < max(map(abs, points[2].kl))
    CausalPolicy.load(str(tmp_path / "out/kl_coef=0.5/best"))
    assert (tmp_path / "out/kl_coef=0.5/done.json").exists() and (tmp_path / "out/kl_coef=0/done.json").exists()


def test_what_is_done_is_not_done_again_and_not_mixed_up(rest, tmp_path, monkeypatch):
    run(rest, tmp_path / "out", "kl_coef=0")
    monkeypatch.setattr(runs.cli, "build", lambda args: pytest.fail("it ran again"))
    run(rest, tmp_path / "out", "kl_coef=0")
    with pytest.raises(
        ValueError, match=r"made with other arguments \(--trainer.max_epochs=4, --trainer.max_epochs=5\); give another --out"
    ):
        run([arg.replace("max_epochs=4", "max_epochs=5") for arg in rest], tmp_path / "out", "kl_coef=0")


def test_an_interrupted_run_goes_on_with_the_same_numbers(rest, tmp_path, monkeypatch):
    run(rest, tmp_path / "whole", "kl_coef=0.1")
    before = Points.measure

    def killed(self, trainer, module, iteration):
        if iteration == 3:
            raise RuntimeError("the power is gone")
        before(self, trainer, module, iteration)

    monkeypatch.setattr(Points, "measure", killed)
    with pytest.raises(RuntimeError, match="power"):
        run(rest, tmp_path / "cut", "kl_coef=0.1")
    assert [p.iteration for p in read_points(tmp_path / "cut/kl_coef=0.1/points.jsonl")] == [0, 1, 2]
    seen = []
    monkeypatch.setattr(Points, "measure", lambda self, *args: (seen.append(args[2]), before(self, *args))[1])
    run(rest, tmp_path / "cut", "kl_coef=0.1")
    assert seen == [3, 4]  # it went on from the checkpoint after two iterations
    whole, cut = ((tmp_path / name / "kl_coef=0.1/points.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut


def test_the_whole_command(rest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lit_rlhf.frontier.run.in_a_process", lambda argv, setting: main([*argv, f"--setting={setting.name}"]))
    more = ["--sweep=kl_coef=0,0.5", "--gold=frontier_gold.gold", "--best_of=4", "--every=2", "--out=out"]
    (tmp_path / "frontier_gold.py").write_text("def gold(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    assert main([*rest, *more]) == 0
    said = capsys.readouterr().out
    assert "kl_coef=0.5: after 4 iterations" in said and "gold picks iteration" in said and "best-of-n, proxy: d (a - b d)" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {mark["setting"] for mark in report["marks"]} == {"kl_coef=0", "kl_coef=0.5", "best of n"}
    assert [mark["iteration"] for mark in report["marks"] if mark["setting"] == "best of n"] == [1, 2, 4]
    samples = json.loads((tmp_path / "out/best_of_n/samples.json").read_text())
    assert len(samples["proxy"]) == len(samples["gold"]) == 4 and len(samples["proxy"][0]) == 4


def test_best_of_one_scores_as_the_policy_does(rest, tmp_path):
    """The zero of both pictures: the SFT policy's mean over many samples and over PPO's point before the first iteration."""
    run(rest, tmp_path / "out", "kl_coef=0")
    samples = runs.best_of_n(rest, tmp_path / "out/best_of_n", gold, 64)
    first = read_points(tmp_path / "out/kl_coef=0/points.jsonl")[0]
    for name in ("proxy", "gold"):
        values = [x for row in samples[name] for x in row]
        spread = (sum((x - sum(values) / len(values)) ** 2 for x in values) / len(values)) ** 0.5
        assert abs(sum(values) / len(values) - sum(getattr(first, name)) / 4) < 3 * spread / 2


def test_best_of_n_is_sampled_in_the_precision_of_the_run(rest, tmp_path, monkeypatch):
    seen, before = [], runs.candidates
    monkeypatch.setattr(runs, "candidates", lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), before(*args))[1])
    for precision in ("32-true", "bf16-mixed"):
        runs.best_of_n([*rest, f"--trainer.precision={precision}"], tmp_path / precision, gold, 2)
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model.kl_coef=0.05": "--model.kl_target=2"}, "would adapt kl_coef away from its sweep"),
        ({"--data.val_data=prompts.jsonl": "--data.val_batch_size=2"}, "measured on held-out prompts"),
    ],
)
def test_refuses(rest, tmp_path, change, said):
    (old, new), *_ = change.items()
    changed = [new if arg == old else arg for arg in rest] + ([new] if old not in rest else [])
    with pytest.raises(ValueError, match=said):
        run(changed, tmp_path / "out", "kl_coef=0.1")
    shutil.rmtree(tmp_path / "out")


def test_refused_in_one_line(rest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lit_rlhf.frontier.run.in_a_process", lambda argv, setting: main([*argv, f"--setting={setting.name}"]))
    assert main([*rest, "--sweep=kl_cof=1"]) == 2
    assert "kl_cof: no such key; did you mean kl_coef?" in capsys.readouterr().err
    assert main([*rest, "--sweep=kl_coef"]) == 2
    assert "give a key and its values" in capsys.readouterr().err
