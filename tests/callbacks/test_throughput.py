"""Throughput: seconds of a clock that only the test moves, and tokens, padding and operations worked out from the rows."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger

from lit_rlhf import PPO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule, perf, rollout
from lit_rlhf.callbacks import Throughput, throughput
from lit_rlhf.cli import build, config_dir

# The tests' Llama: hidden size 32, MLP 64, 2 blocks, 4 heads of 8 of which 2 have keys and values: a block's products have
# 2 x 32 x 32 (q, o) + 2 x 32 x 16 (k, v) + 3 x 32 x 64 weights, and attention takes 4 x 32 operations a block for each pair of tokens.
PRODUCTS, PAIR = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), 2 * 4 * 32
CONSTANT = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05), "scheduler": Schedule("constant")}


class Lines(Logger):
    """Keeps what is logged, a mapping for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, dict[str, float]] = {}

    name, version = "lines", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.found.setdefault(step, {}).update({k: v for k, v in metrics.items() if k.startswith("perf/")})


class Watch:
    """The clock of the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Seen(Callback):
    """Moves the clock while batches are loaded and validated, and keeps the batches."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.batches = watch, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(batch)

    def on_validation_start(self, *_):
        self.watch.now += 1000.0


@pytest.fixture
def watch(monkeypatch) -> Watch:
    made = Watch()
    monkeypatch.setattr(perf, "time", made)
    monkeypatch.setattr(throughput, "time", made)
    return made


def slow(kind: type, watch: Watch) -> type:
    """The module class with a training_step of 5 seconds."""

    class Slow(kind):
        def training_step(self, batch, batch_idx):
            watch.now += 5.0
            return super().training_step(batch, batch_idx)

    return Slow


def pairs_of(prompt: int, responses: list[int]) -> int:
    """Pairs that attention joins in a tree: a token sees itself and what is before it on its path."""
    return prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in responses)


def trees(batch) -> list[tuple[int, list[int]]]:
    lengths = batch.response_mask.sum(1).tolist()
    owner = batch.prompt_of.tolist()
    return [(int(p), [n for n, m in zip(lengths, owner, strict=True) if m == i]) for i, p in enumerate(batch.prompt_mask.sum(1).tolist())]


def operations(found: list[tuple[int, list[int]]], vocabulary: int) -> int:
    """Of one forward pass over trees; `vocabulary` 0: no language-model head."""
    tokens, scored = sum(p + sum(r) for p, r in found), sum(sum(r) for _, r in found)
    return 2 * PRODUCTS * tokens + 2 * 32 * vocabulary * scored + PAIR * sum(pairs_of(p, r) for p, r in found)


def test_sft_by_hand(watch, make_trainer, sft_dir, sft_rows, tokenizer):
    """Four steps of two micro-batches, logged every second step: 10 s a step, of which the validations are none."""
    lines, seen, callback = Lines(), Seen(watch), Throughput()
    module = slow(SFT, watch)(sft_dir, sampling=Sampling(4, 0.0), **CONSTANT)
    data = SFTDataModule(sft_rows, batch_size=4, val_data=sft_rows[:4])
    more = {"max_steps": 4, "accumulate_grad_batches": 2, "log_every_n_steps": 2, "val_check_interval": 2}
    make_trainer(logger=lines, callbacks=[seen, callback], **more).fit(module, data)
    assert [step for step, found in lines.found.items() if found] == [1, 3] and lines.found[3] == callback.last
    for step, batches in ((1, seen.batches[:4]), (3, seen.batches[4:])):
        found = [tree for batch in batches for tree in trees(batch)]
        tokens = sum(p + sum(r) for p, r in found)
        assert lines.found[step]["perf/update_seconds"] == 10.0
        assert lines.found[step]["perf/update_tokens_per_second"] == tokens / 20
        assert lines.found[step]["perf/update_padding"] == 0.0  # trees stand in one row
        assert lines.found[step]["perf/update_flops_per_second"] == pytest.approx(3 * operations(found, len(tokenizer)) / 20)
        assert lines.found[step]["perf/peak_rss_gib"] > 0.05
        assert set(lines.found[step]) == {
            *(f"perf/update_{name}" for name in ("seconds", "tokens_per_second", "padding", "flops_per_second")),
            "perf/wall_seconds",
            "perf/peak_rss_gib",
        }
    assert lines.found[1]["perf/wall_seconds"] == (20 + 1000) / 2
    assert module.policy.tally is None


def test_padding_of_plain_rows_by_hand(watch, make_trainer, sft_dir, pair_rows):
    """One prompt and response a row, each as long as the longest of its batch."""

    class Plain(slow(PairwiseReward, watch)):
        def configure_model(self):
            super().configure_model()
            self.network.form = "plain"

    seen, callback = Seen(watch), Throughput()
    module = Plain(sft_dir, **CONSTANT)
    make_trainer(callbacks=[seen, callback], max_steps=2, log_every_n_steps=1).fit(module, PairwiseDataModule(pair_rows, batch_size=8))
    rows = [p + n for p, r in trees(seen.batches[1]) for n in r]
    assert len(rows) == 16 and len(set(rows)) > 3
    assert callback.last["perf/update_padding"] == pytest.approx(1 - sum(rows) / (16 * max(rows)))
    assert callback.last["perf/update_tokens_per_second"] == sum(rows) / 5
    flops = 3 * (2 * PRODUCTS * sum(rows) + PAIR * sum(n * (n + 1) // 2 for n in rows))
    assert callback.last["perf/update_flops_per_second"] == pytest.approx(flops / 5)


@pytest.fixture
def ppo(watch, make_trainer, sft_dir, reward_dir, sft_rows, monkeypatch):
    """ppo(**Trainer's) -> (module, lines): two iterations of 8 responses, two epochs of two minibatches; sampling takes 2 s, scores 3 s."""
    sample, score = rollout.sample, rollout.score_texts

    def slower(function, seconds):
        def call(*args, **kwargs):
            watch.now += seconds
            return function(*args, **kwargs)

        return call

    def run(callback, **kwargs):
        monkeypatch.setattr(rollout, "sample", slower(sample, 2.0))
        monkeypatch.setattr(rollout, "score_texts", slower(score, 3.0))
        lines, seen = Lines(), Seen(watch)
        size = {"batch_size": 8, "responses_per_prompt": 2, "ppo_epochs": 2, "minibatches": 2}
        module = slow(PPO, watch)(sft_dir, reward_model=reward_dir, sampling=Sampling(8, 1.0), **size, **CONSTANT)
        data = PromptDataModule(sft_rows, val_data=sft_rows[:4], val_batch_size=4)
        make_trainer(logger=lines, callbacks=[seen, callback], **({"max_steps": 8} | kwargs)).fit(module, data)
        return module, {step: found for step, found in lines.found.items() if found}

    return run


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ppo_by_hand(ppo, tokenizer, accumulate):
    callback = Throughput()
    module, lines = ppo(callback, accumulate_grad_batches=accumulate)
    assert list(lines) == [3, 7] and lines[7] == callback.last
    last, found = lines[7], trees(module.experience.batch)
    assert (last["perf/sampling_seconds"], last["perf/scoring_seconds"], last["perf/update_seconds"]) == (2.0, 3.0, 20.0 * accumulate)
    responses, everything = sum(sum(r) for _, r in found), sum(p + sum(r) for p, r in found)
    assert last["perf/sampling_tokens_per_second"] == responses / 2
    assert last["perf/scoring_tokens_per_second"] == pytest.approx(everything / 3)
    assert last["perf/update_tokens_per_second"] == pytest.approx(2 * everything / last["perf/update_seconds"])  # two epochs
    with_head, without = operations(found, len(tokenizer)), operations(found, 0)
    assert last["perf/update_flops_per_second"] == pytest.approx(2 * 3 * (with_head + without) / last["perf/update_seconds"])
    texts = module.scorer.network  # which reads the responses' texts with its own tokenizer
    assert texts.tally is None and last["perf/update_padding"] == last["perf/scoring_padding"] == 0.0
    assert 2 * with_head + without < 3 * last["perf/scoring_flops_per_second"] < 2 * with_head + 3 * without
    assert last["perf/wall_seconds"] == 2 + 3 + 20 * accumulate + 1000 + 5  # the validation samples and scores, too


def test_without_the_callback_nothing_is_counted(watch, make_trainer, sft_dir, sft_rows):
    module = PPO(sft_dir, reward_fn=lambda prompts, responses: [0.0] * len(responses), batch_size=4, sampling=Sampling(4, 1.0), **CONSTANT)
    make_trainer(max_steps=4).fit(module, PromptDataModule(sft_rows))
    assert not module.clock.seconds and not module.clock.running and module.policy.tally is None


def test_mfu(watch, make_trainer, sft_dir, sft_rows, monkeypatch):
    monkeypatch.setattr(throughput, "peak_of", lambda trainer, dtype: 2e6)
    callback = Throughput()
    module = slow(SFT, watch)(sft_dir, **CONSTANT)
    make_trainer(callbacks=[callback], max_steps=1, log_every_n_steps=1).fit(module, SFTDataModule(sft_rows, batch_size=4))
    assert callback.last["perf/update_mfu"] == callback.last["perf/update_flops_per_second"] / 2e6 > 0


@pytest.mark.parametrize(
    ("precision", "weights", "expected"),
    [
        ("32-true", torch.float32, 66.9e12),
        ("32-true", torch.bfloat16, 989.4e12),
        ("bf16-mixed", torch.float32, 989.4e12),
        ("bf16-true", torch.bfloat16, 989.4e12),
        ("16-mixed", torch.float32, 989.4e12),
    ],
)
def test_the_peak_is_that_of_the_precision(precision, weights, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    on = {kind: SimpleNamespace(precision=precision, strategy=SimpleNamespace(root_device=torch.device(kind))) for kind in ("cuda", "cpu")}
    assert throughput.peak_of(on["cuda"], weights) == pytest.approx(expected) and throughput.peak_of(on["cpu"], weights) is None


def test_the_command_line_adds_it_to_a_fit(sft_dir):
    def kinds(*more: str) -> list[str]:
        args = [f"--config={config_dir() / 'tldr/sft.yaml'}", f"--model.model={sft_dir}", "--trainer.accelerator=cpu", *more]
        return [type(c).__name__ for c in build(["fit", *args]).trainer.callbacks]

    assert kinds().count("Throughput") == 1 == kinds("--trainer.callbacks+=Throughput").count("Throughput")
