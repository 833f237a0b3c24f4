"""Nothing that was not written by the user runs code: weights, configs, tokenizers, checkpoints, data, texts in reports.

Where a file could run code, it would make the file `canary`; each such test also shows that its trap works.
"""

import ast
import importlib.util
import io
import json
import pickle
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification

import lit_rlhf
from lit_rlhf import DPO, ILQL, NLPO, PPO, RFT, RLOO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Quark, SFTDataModule
from lit_rlhf.callbacks.sample_table import rich_table
from lit_rlhf.cli import build, main
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.pretrained import load_tokenizer
from lit_rlhf.quickstart.report import make_report
from lit_rlhf.report import lines
from lit_rlhf.report.page import page
from lit_rlhf.scoring import PipelineReward

PACKAGE = Path(lit_rlhf.__file__).parent
SERIALISERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Pickles


def calls(tree: ast.AST):
    """Every call as its dotted name and its keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_of_the_package_unpickles(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} & SERIALISERS
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {name for name in used if name.split(".")[0] in SERIALISERS} - {"pickle.UnpicklingError"}
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "np.load", "torch.hub.load"), name
        if name in ("torch.load", "pl_load") or name.endswith(("load_state_dict_from_url", "load_from_checkpoint")):
            assert keywords.get("weights_only") == "True" or None in keywords, f"{name} without weights_only=True"
        assert (
            keywords.get("weights_only") != "False" and keywords.get("trust_remote_code") != "True" and keywords.get("shell") != "True"
        ), name


class Trap:
    """Unpickling it makes the file `canary`."""

    def __reduce__(self):
        return Path.touch, (Path("canary").absolute(),)


def test_the_trap_works(here):
    pickle.loads(pickle.dumps(Trap()))
    assert (here / "canary").exists()


@pytest.mark.parametrize("content", ["sound", "trap"])
def test_weights_in_a_pickle_are_refused_unread(content, here, sft_dir, reward_dir):
    for source, load in (
        (sft_dir, CausalPolicy.load),
        (reward_dir, ScalarModel.load),
        (reward_dir, lambda path: PipelineReward(path)(["a"], ["b"])),
    ):
        shutil.rmtree("mine", ignore_errors=True)
        shutil.copytree(source, "mine", ignore=shutil.ignore_patterns("*.safetensors"))
        auto = AutoModelForSequenceClassification.from_pretrained(source)
        torch.save(auto.state_dict() if content == "sound" else {"weight": Trap()}, "mine/pytorch_model.bin")
        with pytest.raises((ValueError, OSError), match="safetensors"):
            load("mine")
        assert not (here / "canary").exists()


def raises(prompts, responses):
    raise AssertionError("no text is scored here")


# Code that a directory brings along

CODE = """
from pathlib import Path
Path("canary").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(here, sft_dir, monkeypatch):
    """A sound directory whose classes stand in mine.py; its code makes the canary."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    monkeypatch.syspath_prepend(str(here / "modules"))
    shutil.copytree(sft_dir, "mine")
    (here / "mine/mine.py").write_text(CODE)
    config = json.loads((here / "mine/config.json").read_text()) | {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (here / "mine/config.json").write_text(json.dumps(config))
    return "mine"


def test_a_models_own_code_runs_only_if_trusted(with_code, here):
    for load in (CausalPolicy.load, ScalarModel.load, lambda path: SFT(path).context_length):
        with pytest.raises(
            ValueError, match=r"mine would run code that it brings along \(mine.MineConfig, mine.MineForCausalLM\)"
        ) as error:
            load(with_code)
        assert "set trust_remote_code: true" in str(error.value)
    load_tokenizer(with_code)  # needs none of it
    assert not (here / "canary").exists()
    CausalPolicy.load(with_code, trust_remote_code=True)
    assert (here / "canary").exists()


def test_a_tokenizers_own_code_runs_only_if_trusted(with_code, here):
    path = here / "mine/tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}, "tokenizer_class": "MineTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(ValueError, match=r"mine would run code that it brings along \(mine.MineTokenizer\)"):
        load_tokenizer(with_code)
    assert not (here / "canary").exists()
    load_tokenizer(with_code, trust_remote_code=True)
    assert (here / "canary").exists()


# Checkpoints


PLANTED = """
from pathlib import Path
Path("canary").touch()
class Thing:
    pass
def reward(prompts, responses):
    return [0.0] * len(responses)
"""


@pytest.fixture
def planted(here, monkeypatch):
    """A module on the import path whose import makes the canary; the hyper-parameters that name what is in it."""
    (here / "planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(here))
    names = ("optimizer", "scheduler", "peft", "rouge_tokenizer")
    yield {name: {"class_path": "planted.Thing"} for name in names} | {"reward_fn": "planted.reward"}
    sys.modules.pop("planted", None)


def checkpoint(hparams: dict, key: str = "hyper_parameters") -> str:
    """A file that torch reads with weights_only=True, and that says what to make of its arguments, as files of Lightning's CLI do."""
    found = {key: hparams | {"_instantiator": "lightning.pytorch.cli.instantiate_module"}, "state_dict": {}}
    torch.save(found | {"pytorch-lightning_version": "2.6.6", "global_step": 0, "epoch": 0, "loops": {}}, "planted.ckpt")
    return "planted.ckpt"


@pytest.mark.parametrize("name", ["rouge_tokenizer", "optimizer", "scheduler", "peft", "reward_fn"])
def test_a_modules_checkpoint_names_nothing_to_import(name, here, planted, sft_dir, monkeypatch):
    for kind in (SFT, PPO):
        monkeypatch.setattr(kind, "configure_model", lambda self: None)
        monkeypatch.setattr(kind, "on_load_checkpoint", lambda self, checkpoint: None)
    path = checkpoint({"model": sft_dir, name: planted[name], "trust_remote_code": True})
    if name == "reward_fn":
        with pytest.raises(ValueError, match="exactly one of reward_model and reward_fn"):
            PPO.load_from_checkpoint(path)
    else:
        loaded = SFT.load_from_checkpoint(path)
        assert loaded.loading["trust_remote_code"] is False and not isinstance(vars(loaded).get(name), dict)
    assert not (here / "canary").exists()
    mine = PPO.load_from_checkpoint(path, reward_fn=raises, trust_remote_code=True)
    assert mine.reward_fn is raises and mine.source["trust_remote_code"] is True  # what the user gives is taken
    assert not (here / "canary").exists()


@pytest.mark.parametrize("kind", [SFTDataModule, PairwiseDataModule, PromptDataModule])
def test_a_datamodules_checkpoint_names_nothing_to_import(kind, here, planted):
    path = checkpoint({"data": "x.jsonl", "tokenizer": planted["peft"]}, "datamodule_hyper_parameters")
    assert kind.load_from_checkpoint(path).tokenizer is None
    assert not (here / "canary").exists()


@pytest.mark.parametrize(
    "kind", [SFT, PairwiseReward, PPO, DPO, RLOO, ILQL, RFT, Quark, NLPO, SFTDataModule, PairwiseDataModule, PromptDataModule]
)
def test_a_checkpoint_with_a_pickle_in_it_is_not_run(kind, here):
    torch.save({"state_dict": {}, "hyper_parameters": {"model": Trap()}}, "planted.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        kind.load_from_checkpoint("planted.ckpt")
    assert not (here / "canary").exists()


def test_the_command_line_imports_what_the_user_names_alone(here, planted, sft_dir):
    common = [
        "fit",
        "--model=PPO",
        f"--model.model={sft_dir}",
        "--data=PromptDataModule",
        "--data.data=x.jsonl",
        "--trainer.accelerator=cpu",
    ]
    path = checkpoint({"model": sft_dir} | planted)
    assert build([*common, "--model.reward_fn=test_security.raises", f"--ckpt_path={path}"]).model.reward_fn is raises
    assert not (here / "canary").exists()
    build([*common, "--model.reward_fn=planted.reward"])
    assert (here / "canary").exists()  # so the trap of these tests works


# What models and data write


class Page(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


EVIL = """"><script>alert('1')</script>&lt;<img src=x onerror=alert(1)>' onload='x"""


def test_reports_show_what_was_written_and_run_none_of_it(tmp_path):
    drawn = lines(EVIL, EVIL, EVIL, {EVIL: [(0, 1.0), (1, 2.0)], "b": [(0, 1.0)]}, levels={EVIL: 1.5}, note=EVIL)
    plain = lines("t", "x", "y", {"a": [(0, 1.0), (1, 2.0)], "b": [(0, 1.0)]}, levels={"c": 1.5}, note="n")
    numbers = {"gold": 1.0, "gold_stderr": 0.1, "score": 0.5, "kl": 2.0, "length": 14.0, "rouge1": 0.4, "rouge2": 0.2, "rougeL": 0.3}
    report = {
        "seed": 0,
        "posts": 1,
        "people": {"gold": 1.0},
        "reward_accuracy": 0.5,
        "kl_target": None,
        "stages": [{"name": EVIL} | numbers],
    }
    report |= {"ppo_minus_sft": {"gold": 1.0, "gold_stderr": 0.1, "standard_errors": 1.0}, "seconds": {EVIL: 1.0, "total": 2.0}}
    sample = {"prompt": f"SUBREDDIT: r/x\n\nTITLE: {EVIL}\n\nPOST: {EVIL}\n\nTL;DR:", "summaries": {EVIL: (EVIL + "\x1b[31m\x00", 1.0)}}
    one = report | {"stages": [{"name": "x"} | numbers], "seconds": {"total": 2.0}}
    mild = {"prompt": "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", "summaries": {"x": ("y", 1.0)}}
    usual, found = make_report(one, [mild], tmp_path), make_report(report, [sample, {"prompt": EVIL, "summaries": {}}], tmp_path)
    usual.add("s", plain), found.add(EVIL, drawn)
    usual, found = Page(page(usual)), Page(page(found))
    assert found.tags <= usual.tags and found.attributes <= usual.attributes
    # section; chart: title, two axes, line, level and note; two points' hints have the line's name; stage; seconds; post: title and text;
    # its summary: name and text; the prompt alone
    assert found.text.count(EVIL) == 1 + 6 + 2 + 1 + 1 + 2 + 2 + 1
    assert "\x1b" not in found.text and "\x00" not in found.text


def test_a_terminal_gets_no_control_characters(capsys, here, sft_dir):
    console = Console(file=io.StringIO(), width=400, force_terminal=True, no_color=True)
    console.print(rich_table([{"prompt": "\x1b]0;title\x07a", "response": "\x9b31mb\u202e", "reference": "[link=http://x]c[/link]\r"}]))
    written = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # rich's own
    assert not [c for c in written if not c.isprintable() and c != "\n"] and "[link=http://x]c[/link]" in written
    Path("x.jsonl").write_text(json.dumps({"promp\x1b[2J": "Q", "label": "A"}) + "\n")
    args = ["fit", "--model=SFT", f"--model.model={sft_dir}", "--data=SFTDataModule", "--data.data=x.jsonl", "--trainer.logger=false"]
    assert main([*args, "--trainer.accelerator=cpu"]) == 1
    assert "\x1b" not in (line := capsys.readouterr().err.splitlines()[-1]) and "[2J" in line


# Dependencies


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "?"}], "0 known vulnerabilities in 1 of 2 packages"),
        (
            [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2", "3"]}, {"id": "PYSEC-2"}]}],
            "audit: a 1: PYSEC-1, mended in 2, 3\naudit: a 1: PYSEC-2, mended in no version yet\naudit: 2 known",
        ),
        ([{"name": "b", "skip_reason": "?"}], "none of 1 packages here (its database is not reachable)"),
        (None, "gave no answer (JSONDecodeError)"),
    ],
)
def test_the_audit_is_a_note(answer, said):
    spec = importlib.util.spec_from_file_location("audit", PACKAGE.parent / ".ci/audit.py")
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    text = "" if answer is None else json.dumps({"dependencies": answer})
    assert said in audit.note([sys.executable, "-c", f"print({text!r}); raise SystemExit(1)"])
