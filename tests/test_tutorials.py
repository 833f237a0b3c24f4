"""The tutorials: every notebook runs and shows what it says, and metrics.md has every metric that the modules log."""

import json
import re
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lit_rlhf import DPO, PPO, RLOO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, SFTDataModule
from lit_rlhf.callbacks import Throughput
from lit_rlhf.scorers import imported

TUTORIALS = Path(__file__).parents[1] / "tutorials"
SHORT = Sampling(max_new_tokens=4)

# What a notebook must show, as a cell that runs after its last one.
CHECKS = {
    "01_three_stages": """
assert reward.trainer.callback_metrics["val/accuracy"] > 0.65
assert mean_liking(after) > mean_liking(before) + 0.7, (mean_liking(before), mean_liking(after))
assert written.shape[1] > ids.shape[1]
""",
    "02_your_own_reward": """
assert after["val/score"] > before["val/score"] + 0.3, (before, after)
assert last["val/score"] > first["val/score"] + 0.15, (first, last)
assert odds_after["val/score"] > odds_before["val/score"] + 1, (odds_before, odds_after)
assert evaluate(trained)[0]["val/score"] > before["val/score"] + 0.2
assert (RUNS / "nicer" / "config.json").is_file()
""",
    "03_strategies": """
assert len(one) == len(accumulated) == len(ddp) == len(fsdp) == 3
assert one[-1]["rollout/kl"] > 0.01  # the policy has moved, so that equal numbers mean something
assert largest < 1e-4, largest
assert max(abs(a[name] - b[name]) for a, b in zip(one, fsdp) for name in NAMES) < 1e-4
""",
    "04_policy_gradient": """
# A mean of n samples is off by 1/sqrt(n): ten times less for a hundred times the samples.
assert all(5 < errors[name][0] / errors[name][2] < 20 for name in errors), errors
assert all(b < a / 3 for a, b in zip(errors["R"], errors["R - J"])), errors
final = {name: float(scores.mean()) for name, (_, scores) in runs.items()}
assert all(grouped_mean(runs[name][1] - before).low > 0 for name in ("REINFORCE", "baseline", "critic", "PPO")), final
assert final["REINFORCE, gold + 5"] < final["baseline"] - 0.1 and final["PPO"] > final["baseline"] + 0.2, final
furthest = {name: max(point["kl"] for point in curve) for name, (curve, _) in runs.items()}
assert furthest["no clip"] > 3 * furthest["PPO"], furthest
""",
}


@pytest.fixture
def build(monkeypatch):
    """tutorials/build.py."""
    pytest.importorskip("nbclient")
    monkeypatch.syspath_prepend(str(TUTORIALS))
    import build

    yield build
    sys.modules.pop("build")


def test_every_notebook_has_a_source_and_a_check():
    for kind in ("*.ipynb", "0*.py"):
        assert sorted(path.stem for path in TUTORIALS.glob(kind)) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_is_what_its_source_says_and_holds_outputs_without_errors(name, build):
    written = json.loads((TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8"))
    source = build.notebook(TUTORIALS / f"{name}.py")
    assert [(c["cell_type"], "".join(c["source"])) for c in written["cells"]] == [(c.cell_type, c.source) for c in source.cells], (
        "run python tutorials/build.py"
    )
    code = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and all(cell["execution_count"] for cell in code)
    assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs_and_shows_what_it_says(name, build, tmp_path):
    from nbformat.v4 import new_code_cell

    made = build.notebook(TUTORIALS / f"{name}.py")
    made.cells.append(new_code_cell(CHECKS[name]))
    build.execute(made, tmp_path)


# metrics.md


class Names(Logger):
    """Keeps the names of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    name, version = "names", 0

    def log_metrics(self, metrics, step=None):
        self.seen |= set(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


class Seen(Callback):
    """Keeps the names that only callbacks see."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_train_batch_end(self, trainer, *args):
        self.seen |= set(trainer.callback_metrics)

    def on_validation_end(self, trainer, *args):
        self.seen |= set(trainer.callback_metrics)


def documented() -> list[re.Pattern[str]]:
    """The metrics in backquotes on the page as patterns: <split> stands for anything, test/ for val/, `…/p90` for the name before."""
    page = (TUTORIALS / "metrics.md").read_text(encoding="utf-8")
    names, last = ["epoch"], ""
    for name in re.findall(r"`([^`\n]+)`", page):
        name = last.rsplit("/", 1)[0] + name[1:] if name.startswith("…/") else name
        if re.fullmatch(r"(train|val|rollout|ppo|rloo|data|perf)/[^\s…]+", name):
            last = name
            names += [name, re.sub("^val/", "test/", name)]
    return [re.compile(re.sub("<[^>]*>", ".+", re.escape(name))) for name in names]


def undocumented(names: set[str]) -> set[str]:
    """Names that the page lacks."""
    patterns = documented()
    return {name for name in names if not any(p.fullmatch(name) for p in patterns)}


def logged(make_trainer, module, data) -> set[str]:
    """Every name that a fit and a test of two steps log."""
    logger, seen = Names(), Seen()
    trainer = make_trainer(max_epochs=2, logger=logger, callbacks=[seen, Throughput()], log_every_n_steps=1)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return logger.seen | seen.seen


def length(prompts, responses):
    return [len(r) for r in responses]


def test_the_page_would_miss_a_name():
    assert undocumented({"train/loss", "val/accuracy/worker/a", "data/train/response_tokens/p99", "test/kl"}) == set()
    wrong = {"train/los", "rollout/scores", "val/accuracy/", "ppo/kl", "other"}
    assert undocumented(wrong) == wrong


def test_sft_logs_what_the_page_has(sft_dir, sft_rows, make_trainer):
    data = SFTDataModule(sft_rows, val_data=sft_rows[:4], test_data=sft_rows[:4], batch_size=8)
    names = logged(make_trainer, SFT(sft_dir, sampling=SHORT), data)
    assert {"train/loss", "val/rouge_mean", "test/eos_rate", "data/train/rows", "perf/update_padding"} <= names
    assert undocumented(names) == set()


@pytest.mark.parametrize("loss", ["pairwise", "ranking", "token"])
def test_reward_logs_what_the_page_has(loss, sft_dir, pair_rows, make_trainer):
    data = PairwiseDataModule(pair_rows, val_data=pair_rows[:4], test_data=pair_rows[:4], batch_size=8)
    names = logged(make_trainer, PairwiseReward(sft_dir, loss=loss), data)
    assert {"train/accuracy", "val/accuracy/worker/a", "test/loss"} <= names
    assert undocumented(names) == set()


def test_dpo_logs_what_the_page_has(sft_dir, pair_rows, make_trainer):
    data = PairwiseDataModule(pair_rows, val_data=pair_rows[:4], test_data=pair_rows[:4], batch_size=8)
    names = logged(make_trainer, DPO(sft_dir, sft_coef=0.1), data)
    assert {"train/chosen_reward", "train/sft_loss", "val/margin", "test/accuracy/worker/a"} <= names
    assert undocumented(names) == set()


def test_rloo_logs_what_the_page_has(sft_dir, sft_rows, make_trainer):
    data = PromptDataModule(sft_rows, val_data=sft_rows[:4], test_data=sft_rows[:4])
    names = logged(make_trainer, RLOO(sft_dir, reward_fn=length, sampling=SHORT, batch_size=8, epochs=2, kl_target=1.0), data)
    assert {"rollout/score", "rloo/approx_kl", "val/kl", "test/rouge1", "rollout/kl_coef", "perf/sampling_seconds"} <= names
    assert undocumented(names) == set()


def test_ppo_logs_what_the_page_has(sft_dir, sft_rows, make_trainer):
    data = PromptDataModule(sft_rows, val_data=sft_rows[:4], test_data=sft_rows[:4], ptx_data=sft_rows)
    ppo = PPO(sft_dir, reward_fn=length, sampling=SHORT, batch_size=8, ppo_epochs=2, kl_target=1.0, ptx_coef=0.1, scale_scores=True)
    names = logged(make_trainer, ppo, data)
    assert {"rollout/score", "ppo/ptx_loss", "val/kl", "test/rouge1", "rollout/kl_coef", "perf/sampling_seconds"} <= names
    assert undocumented(names) == set()


# debian_tldr.md


def test_the_gold_reward_of_the_study_by_hand(monkeypatch):
    """ROUGE-1 and L: 1 of 2 words each way, F 1/2; ROUGE-2: no pair of words in common, 0."""
    monkeypatch.chdir(TUTORIALS.parent)
    rouge = imported("tutorials.debian_tldr.rewards.rouge")
    assert rouge(["p", "p"], [" red fox", " red dog"], ["red dog", "red dog"]) == pytest.approx([1 / 3, 1.0])


@pytest.mark.parametrize("page", sorted(path.name for path in TUTORIALS.glob("*.md")))
def test_every_picture_of_a_page_is_there(page):
    text = (TUTORIALS / page).read_text(encoding="utf-8")
    missing = [name for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text) if not (TUTORIALS / name).is_file()]
    assert not missing
