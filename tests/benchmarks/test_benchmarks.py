"""The harness of `make bench`: its arithmetic, its checks, and the README's figures. TRL itself is measured by hand."""

import gzip
import json
import random
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cases
import equal_work
import measuring
import pytest
import report
import torch
from job import check_responses
from work_done import update_flops

from lit_rlhf.data.text import format_tldr

HERE = Path(__file__).parent


def turn(rate: float, peak: int, **more) -> dict:
    return {"side": "trl", "units_per_second": rate, "peak_mib": peak, "phases": {"gc": 0.25}} | more


def ours(rate: float, peak: int) -> dict:
    share = {"with_recomputation": 0.5, "without_recomputation": 0.4}
    found = {"side": "ours", "phases": {"sampling": 2.0}, "padding": 0.04, "units": 32, "seconds_per_step": 32 / rate}
    return turn(rate, peak) | found | {"share_of_peak": share, "peak_gflops": {"float32": 1.0, "bfloat16": 2.0}, "update_seconds": 3.0}


def test_update_flops():
    """One block of hidden 4 with 2 heads of which 1 is for keys, intermediate 3, vocabulary 10; a prompt of 3 with responses of 1 and 2.

    Block weights 2*16 + 2*4*2 + 3*4*3 = 84, on 6 tokens, two FLOPs each: 1008. Attention: 6 pairs in the prompt, 3 + 1 and 6 + 3 in the
    responses: 19 pairs, two products of 4 multiply-adds each: 304. Head: 2*4*10 on 3 tokens: 240. Forward and backward are 3 forwards, two
    backbones, 4 epochs: 4 * 3 * (2 * 1312 + 240) = 34368, and 4 * 240 more with the head's recomputation.
    """
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    found = update_flops(shape | {"intermediate_size": 3, "vocabulary": 10}, [3], [1, 2], [0, 0])
    assert found["without_recomputation"] == 34368 and found["with_recomputation"] == 35328


def test_clock_splits_steps(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 11.0, 12.5, 20.0])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(now))

    class Owner:
        @staticmethod
        def work():
            return 7

    clock = measuring.Clock()
    clock.watch(Owner, "work", "phase")
    clock.watch(Owner, "missing", "nothing")
    clock.mark()  # 0
    assert Owner.work() == 7  # 1 to 3
    clock.mark()  # 10
    Owner.work()  # 11 to 12.5
    clock.mark()  # 20
    assert clock.steps() == [10.0, 10.0]
    assert clock.phase_steps("phase") == [2.0, 1.5] and clock.phase_steps("nothing") == [0.0, 0.0]


def test_hash_ignores_order_alone():
    assert measuring.hash_ids([[1, 2], [3]]) == measuring.hash_ids([[3], [1, 2]])
    assert measuring.hash_ids([[1, 2], [3]]) != measuring.hash_ids([[1], [2, 3]])


def step(ids: str = "a", loss: float = 2.0, tokens: int = 5) -> dict:
    return {"stage": "sft", "rows": "sft", "losses": [loss, 1.0], "first": {"ids": ids, "tokens": 9, "loss_tokens": tokens}}


@pytest.mark.parametrize(
    ("other", "said"),
    [(step("b"), "token ids"), (step(loss=2.0002), "first loss"), (step(loss=float("nan")), "first loss"), (step(tokens=6), "count")],
)
def test_unequal_first_steps_stop_the_bench(other, said):
    with pytest.raises(SystemExit, match=said):
        equal_work.check_first_step(step(), other)


def test_equal_first_steps_pass():
    assert equal_work.check_first_step(step(), step(loss=2.00005))["first_loss_gap"] == pytest.approx(5e-5, rel=1e-3)


def test_unequal_ppo_numbers_stop_the_bench(tmp_path):
    good = {"mask": torch.ones(2, 3).bool(), "logprobs": torch.zeros(2, 3), "values": torch.zeros(2, 3), "scores": torch.zeros(2)}
    for name, dump in (
        ("a", good | {"logprobs_without_pad": good["logprobs"]}),
        ("b", good),
        ("c", good | {"scores": torch.tensor([0, 2e-4])}),
    ):
        torch.save(dump, tmp_path / name)
    assert equal_work.check_ppo(tmp_path / "a", tmp_path / "b")["scores"] == 0
    with pytest.raises(SystemExit, match="scores"):
        equal_work.check_ppo(tmp_path / "a", tmp_path / "c")


def test_unequal_losses_stop_the_bench(tmp_path):
    good = {"loss": torch.tensor(2.0), "advantages": torch.tensor([0.5, 50.0])}
    for name, dump in (("a", good), ("b", good | {"loss": torch.tensor(2.00001)}), ("c", good | {"loss": torch.tensor(2.0001)})):
        torch.save(dump, tmp_path / name)
    assert equal_work.check_losses(tmp_path / "a", tmp_path / "b", "rloo")["loss"] == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(SystemExit, match="rloo: the largest difference of loss is 9.99e-05, over 1e-05"):
        equal_work.check_losses(tmp_path / "a", tmp_path / "c", "rloo")


def test_moved_weights_are_the_same_whatever_their_order():
    one, other = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    for module, names in ((one, "ab"), (other, "ba")):
        for name in names:
            module[name] = torch.nn.Linear(2, 3, bias=False)
            torch.nn.init.zeros_(module[name].weight)
        measuring.move(module, 0.1, 1)
    assert torch.equal(one["a"].weight, other["a"].weight) and one["a"].weight.std() > 0.02


def test_check_responses_end_with_eos_once():
    rows = check_responses(20, 100, 1)
    assert [len(row) for row in rows[:2]] == [53, 53] and all(len(row) <= 53 for row in rows)
    assert all(row[-1] == 1 and 1 not in row[:-1] for row in rows[2:]) and all(1 not in row for row in rows[:2])


def test_every_ratio_reads_runs_of_its_own_case():
    names = [run.name for case in cases.CASES.values() for run in case.runs]
    assert len(names) == len(set(names))
    for case in cases.CASES.values():
        assert {name for ratio in case.ratios for name in (ratio.ours, ratio.base)} <= {run.name for run in case.runs}


def test_ratios_are_taken_turn_by_turn():
    """Rates 6, 8, 9 over 2, 1, 3: ratios 3, 8, 3."""
    turns = {"sft_ours": [ours(6, 100), ours(8, 300), ours(9, 200)], "sft_trl": [turn(2, 400), turn(1, 400), turn(3, 500)]}
    (row,) = report.summary(["sft"], turns)["ratios"]
    assert row["ratio"] == {"min": 3.0, "median": 3.0, "max": 8.0}
    assert (row["ours"], row["base"], row["peak_ours_mib"], row["peak_base_mib"], row["base_gc_seconds"]) == (8, 2, 200, 400, 0.25)


def test_chart_and_growth(tmp_path):
    turns = {f"growth_{n}": [ours(rate, 1024)] for n, rate in ((128, 4.0), (256, 2.0), (512, 1.0), ("256x2", 8.0))}
    record = {"summary": report.summary(["growth"], turns)}
    assert record["summary"]["growth"]["prompt_tokens"] == [(128, 0.25, 1024), (256, 0.5, 1024), (512, 1.0, 1024)]
    assert record["summary"]["growth"]["responses_per_prompt"] == [(1, 0.5, 1024), (2, 0.125, 1024)]
    report.write_chart(record, tmp_path / "growth.svg")
    drawn = ElementTree.parse(tmp_path / "growth.svg").iter()
    lines = [e for e in drawn if e.tag.endswith("polyline") and e.get("class") == "line0"]
    assert [len(line.get("points").split()) for line in lines] == [3, 2]


def test_readme_quotes_the_committed_figures():
    text = report.README.read_text()
    if not (HERE / "benchmarks.json").is_file():  # then it quotes none
        assert report.BEGIN + "\n" + report.END in text
        return
    record = json.loads((HERE / "benchmarks.json").read_text())
    assert report.section(record) in text, "run python tests/benchmarks/report.py tests/benchmarks/benchmarks.json"
    for row in record["summary"]["ratios"]:  # and the summary is that of the turns
        found = [
            a["units_per_second"] / b["units_per_second"]
            for r in (r for case in cases.CASES.values() for r in case.ratios if r.what == row["what"])
            for a, b in zip(record["turns"][r.ours], record["turns"][r.base], strict=True)
        ]
        assert row["ratio"]["median"] == pytest.approx(statistics.median(found))


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def test_missing_data_is_said_plainly(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "run.py", "--quick", "--data", tmp_path, "--folder", tmp_path / "b"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "tldr_train.jsonl.gz is missing" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_quick_bench_of_ours(tmp_path):
    """The whole harness but for TRL, on made-up posts."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(400)]
    text = lambda n: " ".join(draw.choices(words, k=n))  # noqa: E731
    posts = [format_tldr("x", text(3), text(draw.randint(20, 60))) for _ in range(400)]
    write(tmp_path / "debian_tldr/tldr_train.jsonl.gz", [{"prompt": post, "label": " " + text(6)} for post in posts])
    pairs = [{"prompt": post, "chosen": " " + text(6), "rejected": " " + text(7)} for post in posts]
    for name in ("debian_tldr/comparisons_train.jsonl.gz", "hh_harmless/train.jsonl.gz"):
        write(tmp_path / name, pairs)
    command = [sys.executable, HERE / "run.py", "--quick", "--threads", "1", "--data", tmp_path, "--folder", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "b" / "quick.json").read_text())
    assert set(found["turns"]) == {"sft_ours", "reward_ours", "ppo_ours", "ppo_8x4_ours", "ppo_bf16_ours", "dpo_ours", "rloo_ours"}
    assert all(t["units_per_second"] > 0 and t["growth_mib"] > 0 for run in found["turns"].values() for t in run)
    ppo = found["turns"]["ppo_ours"][0]
    assert {"collect", "sampling", "log-probs and values", "reward model"} <= set(ppo["phases"])
    assert 0 < ppo["update_seconds"] < ppo["seconds_per_step"] and 0 < ppo["share_of_peak"]["without_recomputation"] < 1
    assert len(found["turns"]["sft_ours"][0]["losses"]) == 8  # 2 warm-up steps, 6 timed ones
