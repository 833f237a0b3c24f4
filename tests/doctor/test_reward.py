"""Rewards that are wrong in one way each: scripted functions of the text, or the tiny reward model with one thing changed."""

import math
import zlib

import pytest
import torch
from handover import text
from safetensors.torch import load_file

from lit_rlhf.doctor.reward import accuracy, calibration, center, eos_read, head, length_bias, order
from lit_rlhf.networks import ScalarModel
from lit_rlhf.scorers import load_scorer
from lit_rlhf.scoring import text_batch


def worth(prompts: list[str], responses: list[str]) -> list[float]:
    """Cats are good, dogs are bad."""
    return [float(r.count("cat") - r.count("dog")) for r in responses]


def noise(response: str) -> float:
    """Between 0 and 1, the same for the same text in every process."""
    return zlib.crc32(response.encode()) / 2**32


def of_worth(number: int, draws: int = 400) -> list[dict]:
    """Pairs in which the one with more cats and fewer dogs is preferred; half of them of one length."""
    rows = []
    for i in range(number, number + draws):
        one, two = text(i, 8), text(7000 + i, 8 + 4 * (i % 2))
        if worth(["", ""], [one, two])[0] != worth(["", ""], [one, two])[1]:
            better = worth([""], [one]) > worth([""], [two])
            rows.append({"prompt": f"{i} says", "chosen": one if better else two, "rejected": two if better else one})
    return rows


@pytest.fixture
def scripted(case, reference_rows):
    """scripted(reward, **changes) -> a Case of that reward function on pairs ordered by cats and dogs."""
    return lambda reward, **more: case(**{"reward": reward, "data": [reference_rows, of_worth(0)], "rows": 400} | more)


@pytest.mark.parametrize("check", [accuracy, head, length_bias])
def test_passes_on_what_is_whole(case, check):
    assert check(case()).status == "pass"


def test_the_reward_that_made_the_pairs(scripted):
    assert accuracy(scripted(worth)).numbers["accuracy"] == 1.0
    assert length_bias(scripted(worth)).status == "pass"


def test_sign_flipped(scripted):
    found = accuracy(scripted(lambda prompts, responses: [-x for x in worth(prompts, responses)]))
    assert found.status == "fail" and found.numbers["accuracy"] == 0.0 and "sign is flipped" in found.reason


def test_at_chance(scripted):
    found = accuracy(scripted(lambda prompts, responses: [noise(r) for r in responses]))
    assert found.status == "fail" and found.numbers["low"] < 0.5 < found.numbers["high"] and "at chance" in found.reason


@pytest.fixture
def with_head(case, reward_dir, tmp_path, tokenizer):
    """with_head(f) -> a Case whose reward model's head is f of the true one."""

    def change(function, **more):
        weights = load_file(f"{reward_dir}/model.safetensors")
        network = ScalarModel.load(reward_dir)
        network.save(tmp_path / "changed", weights | {"score.weight": function(weights["score.weight"])})
        return case(reward=str(tmp_path / "changed"), **more)

    return change


def test_head_initialised_anew(with_head, reward_dir, reference_rows):
    torch.manual_seed(7)
    rows = ordered_by(reward_dir, shift=0)
    broken = with_head(lambda w: torch.randn_like(w) * w.std(), data=[reference_rows, rows], rows=1000)
    found = head(broken)
    assert found.status == "fail" and found.numbers["gain_low"] > 0.05 and "initialised anew" in found.reason


def test_head_with_its_sign_flipped(with_head, reward_dir, reference_rows):
    found = head(with_head(lambda w: -w, data=[reference_rows, ordered_by(reward_dir, shift=0)], rows=1000))
    assert found.status == "fail" and found.numbers["own"] < 0.05 and "sign is flipped" in found.reason


def ordered_by(reward_dir: str, shift: int, count: int = 500) -> list[dict]:
    """Pairs in the order of the model's scores read `shift` tokens before the end."""
    network = load_scorer(reward_dir).network
    prompts, one, two = ([text(k + i, 4 + i % 5) for i in range(count)] for k in (0, 20000, 40000))
    scores = []
    for texts in (one, two):
        batch = text_batch(network.tokenizer, prompts, texts)
        with torch.no_grad():
            scalars = network(batch)
        scores.append(torch.stack([row[int(mask.sum()) - shift] for row, mask in zip(scalars, batch.response_mask, strict=True)]))
    better = (scores[0] > scores[1]).tolist()
    return [{"prompt": p, "chosen": a if w else b, "rejected": b if w else a} for p, a, b, w in zip(prompts, one, two, better, strict=True)]


@pytest.mark.parametrize(("shift", "status"), [(0, "pass"), (1, "fail")])
def test_trained_with_and_without_eos(case, reward_dir, reference_rows, shift, status):
    found = eos_read(case(data=[reference_rows, ordered_by(reward_dir, shift)], rows=500))
    assert found.status == status
    assert found.numbers["without" if shift else "with"] == 1.0 and found.numbers["with" if shift else "without"] < 1.0


def test_claims_more_than_it_delivers(scripted):
    found = calibration(
        scripted(lambda prompts, responses: [20 * w + 200 * noise(r) for w, r in zip(worth(prompts, responses), responses, strict=True)])
    )
    assert found.status == "fail" and found.numbers["confidence"] > 0.95 and "claim more" in found.reason


def test_calibration_by_hand(scripted):
    """Differences of log 3 claim 0.75; three in four are right: no error."""
    rows = [{"prompt": f"p {i}", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(40)]
    scores = {f"{side} {i}": (math.log(3) if (side == "a") == (i % 4 > 0) else 0.0) for side in "ab" for i in range(40)}
    found = calibration(scripted(lambda prompts, responses: [scores[r.strip()] for r in responses], data=[rows]))
    assert found.status == "pass" and found.numbers == pytest.approx({"ece": 0.0, "confidence": 0.75, "accuracy": 0.75}, abs=1e-6)


def test_length_in_disguise(scripted):
    longer = [{"prompt": f"{i} says", "chosen": " cat" * (8 + i % 2), "rejected": " cat" * (3 + i % 5)} for i in range(200)]
    found = length_bias(scripted(lambda prompts, responses: [float(len(r.split())) for r in responses], data=[longer]))
    assert found.status == "fail" and found.numbers["r2"] == pytest.approx(1.0) and "follows length" in found.reason  # " cat" is one token
    assert found.numbers["longer_preferred"] == 1.0


def test_blind_at_like_length(scripted):
    """Accurate where lengths differ, a coin where they do not."""
    rows = [{"prompt": f"{i} says", "chosen": text(i, 8 if i % 2 else 12), "rejected": text(9000 + i, 8)} for i in range(300)]
    found = length_bias(scripted(lambda prompts, responses: [(len(r.split()) > 10) * 5.0 + 6 * noise(r) for r in responses], data=[rows]))
    assert found.status == "fail" and found.numbers["matched_low"] <= 0.5 and "at like length it is at chance" in found.reason


def reads_the_post(prompts: list[str], responses: list[str]) -> list[float]:
    """How much of the prompt's first words come in order, at the beginning, and whether the end is there."""
    out = []
    for prompt, response in zip(prompts, responses, strict=True):
        said, wanted = response.split(), prompt.split()
        out.append(sum(a == b for a, b in zip(said, wanted, strict=False)) + 2.0 * response.endswith("."))
    return out


@pytest.fixture
def copies() -> list[dict]:
    """Prompts whose reference repeats them and adds a word and a full stop."""
    return [{"prompt": text(i, 6), "label": " " + text(i, 6) + " indeed."} for i in range(80)]


def test_kinds_in_their_order(scripted, copies):
    case = scripted(reads_the_post, data=[copies])
    case.rollout.texts[:] = [row["prompt"] + " ok" for row in copies_of(case)]
    found = order(case)
    assert found.status == "pass", found
    assert found.numbers["reference"] == 8.0


def copies_of(case) -> list[dict]:
    return [{"prompt": p} for p in case.prompts]


def test_a_reward_that_does_not_read_the_post(scripted, copies):
    found = order(scripted(lambda prompts, responses: [float(len(r)) for r in responses], data=[copies]))
    assert found.status == "fail" and "reference - other is 0.00" in found.reason


def test_samples_above_references_warn(scripted, copies):
    case = scripted(reads_the_post, data=[copies])
    case.rollout.texts[:] = [p + " more." for p in case.prompts]
    case.references[1][:] = [" " + " ".join(r.split()[:5]) + " and." for r in case.references[1]]
    assert order(case).status == "warn" and "samples score above" in order(case).reason


def test_references_far_from_zero(scripted, copies):
    assert center(scripted(lambda prompts, responses: [x + 50 for x in reads_the_post(prompts, responses)], data=[copies])).status == "warn"
    assert center(scripted(lambda prompts, responses: [x - 8 for x in reads_the_post(prompts, responses)], data=[copies])).status == "pass"
