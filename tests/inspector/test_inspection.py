"""The inspector's numbers against plain transformers and loops, what it shows of odd tokens, and its command line."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from browser import needs_chromium, open_page
from families import build
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf import Sampling, inspect_response
from lit_rlhf.__main__ import main
from lit_rlhf.inspector.colours import fragment, marked, number, summary, tint
from lit_rlhf.inspector.inspection import Inspection, token_texts
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.report.page import page
from lit_rlhf.rollout import Actors, Shaping
from lit_rlhf.scoring import FunctionScorer, ModelScorer

BETA, GAMMA, LAM, TEMPERATURE = 0.3, 0.9, 0.8, 0.7
ODD = " the\tcat\n\nsat <b>on</b> é\x1b 🐈"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def dirs(request, tmp_path_factory, tokenizer) -> dict[str, str]:
    """Directories of the four networks, each with weights of its own."""
    path, ids = tmp_path_factory.mktemp(request.param), {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for i, role in enumerate(("policy", "reference", "value", "reward")):
        auto, more = (AutoModelForCausalLM, {}) if i < 2 else (AutoModelForSequenceClassification, {"num_labels": 1})
        model = build(auto, request.param, 2.0 + i, vocab_size=len(tokenizer), **ids, **more)
        model.save_pretrained(path / role)
        tokenizer.save_pretrained(path / role)
    return {role: str(path / role) for role in ("policy", "reference", "value", "reward")}


@pytest.fixture(scope="module")
def actors(dirs) -> Actors:
    networks = [CausalPolicy.load(dirs["policy"]).eval(), CausalPolicy.load(dirs["reference"]).eval()]
    return Actors(*networks, ScalarModel.load(dirs["value"]).eval(), ModelScorer(ScalarModel.load(dirs["reward"]).eval()))


def recomputed(dirs, prompt: str, response: list[int], floor: float | None, text: str | None = None) -> dict[str, list[float]]:
    """Every column from transformers' own outputs and loops over the tokens; the score of `text`, where given, tokenised anew."""
    tokenizer = AutoTokenizer.from_pretrained(dirs["policy"])
    start, count = tokenizer(prompt)["input_ids"], len(response)
    ids = torch.tensor([start + response])
    out = {}
    with torch.no_grad():
        for name, role in (("logprob", "policy"), ("ref_logprob", "reference")):
            logits = AutoModelForCausalLM.from_pretrained(dirs[role])(ids).logits[0, len(start) - 1 : -1].double()
            logits[:, tokenizer.pad_token_id] = -torch.inf  # sampling never draws it
            out[name] = [float(row.log_softmax(-1)[i]) for row, i in zip(logits / TEMPERATURE, response, strict=True)]
        model = AutoModelForSequenceClassification.from_pretrained(dirs["value"])
        states = model.base_model(ids).last_hidden_state[0, len(start) - 1 : -1]
        out["value"] = model.score(states)[:, 0].tolist()
        read = response if text is None else tokenizer(text)["input_ids"]
        scored = read if read and read[-1] == tokenizer.eos_token_id else [*read, tokenizer.eos_token_id]
        score = float(AutoModelForSequenceClassification.from_pretrained(dirs["reward"])(torch.tensor([start + scored])).logits)
    out["kl"] = [a - b for a, b in zip(out["logprob"], out["ref_logprob"], strict=True)]
    out["reward"] = [-BETA * kl for kl in out["kl"]]
    out["reward"][-1] += score if floor is None else floor
    out["advantage"], ahead = [0.0] * count, 0.0
    for t in reversed(range(count)):
        later = out["value"][t + 1] if t + 1 < count else 0.0
        ahead = out["reward"][t] + GAMMA * later - out["value"][t] + GAMMA * LAM * ahead
        out["advantage"][t] = ahead
    out["return"] = [a + v for a, v in zip(out["advantage"], out["value"], strict=True)]
    return out | {"score": score}


def shown(html: str) -> dict[str, list[float]]:
    """The numbers that stand in the page's table."""
    cells = re.findall(r'<td data-name="(\w+)"[^>]*>(-?[\d.]+)</td>', html)
    names = dict.fromkeys(name for name, _ in cells)
    return {name: [float(value) for own, value in cells if own == name] for name in names}


SETTING = {"kl_coef": BETA, "sampling": Sampling(12, TEMPERATURE), "shaping": Shaping(None, whiten_advantages=False, gamma=GAMMA, lam=LAM)}


@pytest.mark.parametrize("response", [" the cat sat on a mat", ODD])
def test_numbers_of_a_given_response(dirs, actors, tokenizer, response):
    found = inspect_response(actors, "the dog ran", response, **SETTING)
    ids = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    true = recomputed(dirs, "the dog ran", ids, None)
    table = shown(found._repr_html_())
    assert len(table) == 7 and found.finished and len(found.tokens) == len(ids)
    assert found.score == pytest.approx(true["score"], abs=1e-4)
    for name, values in table.items():
        assert values == pytest.approx(true[name], abs=2e-4), name
        assert found.columns[name] == pytest.approx(true[name], abs=1e-4), name


def test_numbers_of_a_sampled_response(dirs, actors):
    setting = SETTING | {"shaping": Shaping(-1.0, whiten_advantages=False, gamma=GAMMA, lam=LAM)}
    found = inspect_response(actors, "the dog ran", **setting, seed=3)
    assert inspect_response(actors, "the dog ran", **setting, seed=3) == found
    assert inspect_response(actors, "the dog ran", **setting, seed=4).tokens != found.tokens
    assert found.shaped_score == (found.score if found.finished else -1.0)
    true = recomputed(dirs, "the dog ran", found.ids, None if found.finished else -1.0, found.response)
    assert found.score == pytest.approx(true["score"], abs=1e-4)
    for name, values in shown(fragment(found)).items():
        assert values == pytest.approx(true[name], abs=2e-4), name


def test_without_a_value_network_or_a_reward(actors):
    bare = Actors(actors.policy, actors.reference, None, FunctionScorer(lambda prompts, responses: [2.0] * len(responses)))
    found = inspect_response(bare, "the dog ran", " away", **SETTING)
    assert "value" not in found.columns and found.score == 2.0
    rewards, total = found.columns["reward"], 0.0
    for t in reversed(range(len(rewards))):  # with V = 0 the advantage is the rewards to come, each discounted by gamma lam
        total = rewards[t] + GAMMA * LAM * total
        assert found.columns["advantage"][t] == pytest.approx(total, abs=1e-5)
    assert 'data-name="value"' not in fragment(found) and page(found.report()).count("<svg") == 3


def test_the_policy_against_itself_has_no_kl(actors):
    same = Actors(actors.policy, actors.policy, actors.value, actors.scorer)
    assert max(map(abs, inspect_response(same, "the dog", " ran", **SETTING).columns["kl"])) < 1e-6


def test_tokens_join_to_the_text_and_odd_ones_can_be_seen(actors, tokenizer):
    ids = tokenizer(ODD)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    # é and the cat are bytes that this small vocabulary does not join: those tokens stand as the vocabulary has them
    plain = [t for t in texts if t in ODD]
    assert "".join(plain).startswith(" the\tcat\n\nsat <b>on</b> ") and len(plain) < len(texts)
    html = fragment(inspect_response(actors, "the dog", ODD, **SETTING))
    assert "<b>on" not in html and "\x1b" not in html and "&lt;" in html
    for mark in ("<i>·</i>", "<i>↵</i>", "<i>⇥</i>", "�", "<br>", "&lt;eos&gt;", "token special"):
        assert mark in html
    assert "trained on" in html


def test_marks_by_hand():
    assert marked(" a\n\t<\x00") == "<i>·</i>a<i>↵</i><i>⇥</i>&lt;�" and marked("") == "<i>∅</i>"
    assert number(-0.00001) == "0.0000" and number(-1.23456) == "-1.2346"
    assert tint(1.0, 2.0).endswith("31 111 235 / 0.31)") and tint(-2.0, 2.0).endswith("214 105 20 / 0.62)") and tint(0, 0).endswith("0.00)")


def test_summary_says_what_was_replaced():
    columns = {"kl": [0.5, 0.25], "reward": [-0.5, 1.0]}
    found = Inspection("p", "r", [3, 4], ["a", "b"], [False, False], columns, 2.0, -1.0, False, {"lam": 0.95})
    assert summary(found) == (
        "score 2.000, replaced by -1.000; KL 0.750 nats; sum of rewards 0.500; 2 tokens, cut off at the limit, it did not end. "
        "Settings: lam 0.95."
    )


def test_networks_with_other_tokenizers_are_refused(actors, sft_dir):
    other = AutoTokenizer.from_pretrained(sft_dir)
    other.add_tokens(["another"])
    reference = SimpleNamespace(tokenizer=other)
    with pytest.raises(ValueError, match="the reference network has another tokenizer"):
        inspect_response(Actors(actors.policy, reference, None, actors.scorer), "the", " cat")


def test_a_response_that_does_not_fit_is_refused(actors):
    with pytest.raises(ValueError, match="exceed the model's context of 128"):
        inspect_response(actors, "the dog", " the cat" * 200)


def command(dirs, tmp_path, *more) -> list[str]:
    networks = [f"--{role}={path}" for role, path in dirs.items()]
    return ["inspect", *networks, f"--out={tmp_path / 'out'}", "--max_new_tokens=8", *more]


def test_the_command_line(dirs, tmp_path, capsys):
    assert main(command(dirs, tmp_path, "--prompt=the dog ran", "--response= away", "--kl_coef=0.3")) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    said = capsys.readouterr().out
    assert f"score {found['score']:.3f}" in said and said.rstrip().endswith("report.html")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert shown(html)["advantage"] == pytest.approx(found["columns"]["advantage"], abs=1e-4)
    assert html.count("<svg") == 3 and "<script" not in html and found["settings"]["kl_coef"] == 0.3


def test_a_row_of_a_file(dirs, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "label": "x"}) + "\n" for p in ("the cat", "a dog ran")))
    assert main(command(dirs, tmp_path, f"--data={rows}", "--row=1")) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["prompt"] == "a dog ran"
    capsys.readouterr()
    for row, said in (("2", "has 2 usable rows"), ("-1", "counted from 0")):
        assert main(command(dirs, tmp_path, f"--data={rows}", f"--row={row}")) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert line.startswith(f"lit-rlhf: error: --row {row}: ") and said in line


def test_a_directory_that_is_not_there(dirs, tmp_path, capsys):
    assert main(command(dirs | {"policy": str(tmp_path / "nothing")}, tmp_path, "--prompt=a")) == 2
    assert "no model directory at" in capsys.readouterr().err


@needs_chromium
def test_in_a_browser(actors, tmp_path):
    path = inspect_response(actors, "the dog", ODD, **SETTING).report().write(tmp_path / "page")
    dom, console = open_page(path, tmp_path / "profile", "--dump-dom")
    assert console == [] and dom.count("<svg") == 3 and dom.count('class="strip"') == 5
