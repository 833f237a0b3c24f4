"""The command line: every mistake is refused in one line before anything loads, and a run's end is told by its exit code."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lit_rlhf import cli
from lit_rlhf.__main__ import main as apart
from lit_rlhf.cli import CLI, build, config_dir, main, raised_here
from lit_rlhf.cli_errors import one_line
from lit_rlhf.functional import last_index

PPO = ["fit", f"--config={config_dir() / 'tldr/ppo.yaml'}"]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_RLHF_DEBUG", raising=False)


@pytest.fixture
def model_dir(tmp_path):
    """A directory that passes for a model until something tries to load it."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/config.json").write_text("{}")
    return str(tmp_path / "sft")


def refused(capsys, args: list[str]) -> str:
    """The one line of an error that main(args) ends with, exit code 2."""
    assert main(args) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Seed set to")]
    assert len(lines) == 1 and lines[0].startswith("lit-rlhf: error: "), lines
    return lines[0].removeprefix("lit-rlhf: error: ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.init_args.kl_coef=abc", "model.kl_coef: expected float, got abc (--model.init_args.kl_coef=abc)"),
        ("--model.kl_coff=0.1", "model.kl_coff: no such key; did you mean kl_coef? (--model.kl_coff=0.1)"),
        (
            "--model.sampling.max_new_token=4",
            "model.sampling.max_new_token: no such key; did you mean max_new_tokens? (--model.sampling.max_new_token=4)",
        ),
        ("--model.sampling.temperature=hot", "model.sampling.temperature: expected float, got hot (--model.sampling.temperature=hot)"),
        ("--data.limit_val_row=4", "data.limit_val_row: no such key; did you mean limit_val_rows? (--data.limit_val_row=4)"),
        ("--trainer.max_epoch=4", "trainer.max_epoch: no such key; did you mean max_epochs? (--trainer.max_epoch=4)"),
        ("--trainr.max_epochs=4", "trainr.max_epochs: no such key; did you mean max_epochs? (--trainr.max_epochs=4)"),
        ("--model.kl=1", "model.kl: no such key"),  # and not an abbreviation of kl_coef
        ("--trainer.max_step=4", "trainer.max_step: no such key; did you mean max_steps? (--trainer.max_step=4)"),
        ("--model=PP0", "model: no class is named PP0"),
        ("--trainer.callbacks+=ExportHf", "trainer.callbacks: no class is named ExportHf"),
        ("--model.reward_fn=os.path.nope", "module 'posixpath' has no attribute 'nope'"),
        ("--model.reward_baseline=median", "model.reward_baseline: expected Literal['none', 'mean', 'reference'], got median"),
        ("--config=missing.yaml", "missing.yaml"),
        ("--trainer.accelerator=abacus", "abacus"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(capsys, model_dir, option, message):
    assert message in refused(capsys, [*PPO, f"--model.model={model_dir}", f"--model.reward_model={model_dir}", option])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  init_args:\n    kl_cof: 1\n", "model.kl_cof: no such key; did you mean kl_coef? (mine.yaml:3)"),
        ("model:\n  init_args:\n    kl_coef: abc\n", "model.kl_coef: expected float, got abc (mine.yaml:3)"),
        ("trainer:\n  max_epoch: 1\n", "trainer.max_epoch: no such key; did you mean max_epochs? (mine.yaml:2)"),
        ("model: [\n", "mine.yaml"),
        ("modell:\n  class_path: PPO\n", "modell"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_line(capsys, text, message):
    with open("mine.yaml", "w") as file:
        file.write(text)
    assert message in refused(capsys, [*PPO, "--config=mine.yaml"])


def test_a_missing_directory_is_refused(capsys, model_dir):
    assert "runs/tldr/sft/hf" in refused(capsys, PPO)
    assert "runs/tldr/reward/hf" in refused(capsys, [*PPO, f"--model.model={model_dir}"])
    assert "nowhere/at/all" in refused(
        capsys, [*PPO, f"--model.model={model_dir}", f"--model.reward_model={model_dir}", "--model.value_init=nowhere/at/all"]
    )


def test_a_reward_is_given_exactly_once(capsys, model_dir):
    both = ["--model.reward_fn=os.path.commonprefix", f"--model.reward_model={model_dir}"]
    assert "exactly one of reward_model and reward_fn" in refused(capsys, [*PPO, f"--model.model={model_dir}", *both])
    assert "exactly one of reward_model and reward_fn" in refused(capsys, [*PPO, f"--model.model={model_dir}", "--model.reward_model=null"])


def failed(capsys, args: list[str]) -> str:
    """The last line of a run that main(args) ends with, exit code 1."""
    assert main(args) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1].removeprefix("lit-rlhf: error: ")


def test_a_bad_row_is_named_before_the_model_loads(capsys, sft_dir):
    shutil.copytree(sft_dir, "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    with open("rows.jsonl", "w") as file:
        file.write(json.dumps({"prompt": "a post", "label": "sum"}) + "\n" + json.dumps({"prompt": "a post", "label": None}) + "\n")
    args = ["fit", "--model=SFT", "--model.model=no_weights", "--data=SFTDataModule", "--data.data=rows.jsonl"]
    args += ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    assert "rows.jsonl:2" in failed(capsys, args)
    assert "no_such.jsonl" in failed(capsys, [*args, "--data.data=no_such.jsonl"])


def raises(prompts, responses):
    raise RuntimeError("the judge is out")


def too_few(prompts, responses):
    return [1.0]


def not_a_number(prompts, responses):
    return [1.0] * (len(responses) - 1) + [float("nan")]


@pytest.mark.parametrize(("fn", "said"), [("raises", "the judge is out"), ("too_few", "1"), ("not_a_number", "nan")])
def test_a_bad_reward_names_the_function(capsys, sft_dir, fn, said):
    with open("prompts.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in range(8))
    args = ["fit", "--model=PPO", f"--model.model={sft_dir}", f"--model.reward_fn=test_cli.{fn}", "--model.batch_size=4"]
    args += ["--model.sampling.max_new_tokens=4", "--data=PromptDataModule", "--data.data=prompts.jsonl"]
    args += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    line = failed(capsys, args)
    assert fn in line and said in line


def test_no_subcommand_no_configuration(capsys):
    assert "{fit,validate,test,predict}" in refused(capsys, [])
    assert "'fitt'" in refused(capsys, ["fitt"])
    assert "model" in refused(capsys, ["fit"])


def test_debug_shows_the_traceback(capsys, monkeypatch):
    assert main([*PPO, "--model.kl_coef=abc", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("LIT_RLHF_DEBUG", "1")
    assert main([*PPO, "--model.kl_coef=abc"]) == 2
    assert "Traceback" in capsys.readouterr().err


# Runs with small modules of this file: `test_cli.Tiny` is what a user's own class is to the command line.


class Tiny(pl.LightningModule):
    """Does at its first training batch what `deed` says."""

    def __init__(self, deed: str = "", rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.deed, self.rate, self.layer = deed, rate, torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        if self.deed == "sigterm" and self.trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.deed == "ours":
            last_index(torch.zeros(1, 2, dtype=torch.bool))
        if self.deed == "theirs":
            raise ValueError("a bug in somebody's code")
        return self.layer(batch).sum()

    def predict_step(self, batch, batch_idx):
        return [{"response": f"{x:.0f}"} for x in batch.flatten().tolist()]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Numbers(pl.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(4.0)[:, None])

    predict_dataloader = train_dataloader


def tiny(subcommand: str, *more: str) -> list[str]:
    trainer = {"max_epochs": 2, "default_root_dir": ".", "accelerator": "cpu", "enable_progress_bar": "false", "log_every_n_steps": 1}
    return [subcommand, "--model=test_cli.Tiny", "--data=test_cli.Numbers", *(f"--trainer.{k}={v}" for k, v in trainer.items()), *more]


def test_a_run_ends_with_0_and_leaves_logs_and_config(tmp_path):
    assert main(tiny("fit")) == 0
    logs = tmp_path / "lightning_logs/version_0"
    assert any(path.name.startswith("events.out.tfevents") for path in logs.iterdir())
    saved = yaml.safe_load((logs / "config.yaml").read_text())
    assert saved["seed_everything"] == 0 and saved["model"]["class_path"] == "test_cli.Tiny"
    assert main(["fit", f"--config={logs / 'config.yaml'}", "--trainer.max_epochs=1"]) == 0  # the saved file runs again


def test_sigterm_ends_with_143_and_a_checkpoint(tmp_path):
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=saved", "--trainer.callbacks.save_on_exception=true"]
    assert main(tiny("fit", "--model.deed=sigterm", *save)) == 143
    assert list((tmp_path / "saved").iterdir())


def test_last_goes_on_from_what_sigterm_left(tmp_path, caplog):
    """Without a ModelCheckpoint that saves on exceptions the guard does; `last` starts afresh where there is nothing."""
    with caplog.at_level(logging.INFO):
        assert main(tiny("fit", "--model.deed=sigterm", "--ckpt_path=last")) == 143
        assert "no checkpoint in ." in caplog.text and "so the run starts from the beginning" in caplog.text
        (saved,) = tmp_path.rglob("interrupted.ckpt")
        assert torch.load(saved, weights_only=True)["global_step"] == 2
        cli = build(tiny("fit", "--ckpt_path=last"))
        cli.run()
    assert cli.trainer.ckpt_path == str(saved) and cli.trainer.global_step == 8


def test_last_passes_over_a_damaged_file(tmp_path):
    assert main(tiny("fit", "--trainer.max_epochs=1")) == 0
    (good,) = tmp_path.rglob("*.ckpt")
    bad = good.with_name("newer.ckpt")
    bad.write_bytes(good.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="newer.ckpt cannot be read: it is damaged .* going on to the next older one"):
        assert build(tiny("fit")).last_checkpoint() == str(good)


def test_checkpoints_are_written_by_our_own_plugin(tmp_path):
    cli = build(tiny("fit"))
    assert type(cli.trainer.strategy.checkpoint_io).__name__ == "AtomicCheckpointIO"
    assert [type(c).__name__ for c in cli.trainer.callbacks].count("CheckpointGuard") == 1
    own = build(tiny("fit", "--trainer.plugins=lightning.fabric.plugins.TorchCheckpointIO", "--trainer.enable_checkpointing=false"))
    assert type(own.trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
    assert not any(type(c).__name__ == "CheckpointGuard" for c in own.trainer.callbacks)


def test_an_error_of_ours_is_one_line_and_1(capsys):
    assert main(tiny("fit", "--model.deed=ours")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("lit-rlhf: error: ")


def test_an_error_of_others_keeps_its_traceback():
    with pytest.raises(ValueError, match="somebody's code"):
        main(tiny("fit", "--model.deed=theirs"))


def test_raised_here_wants_a_raise_statement_of_the_package():
    for call, ours in (
        (lambda: last_index(torch.zeros(1, 2, dtype=torch.bool)), True),
        (lambda: int("x"), False),
        (lambda: last_index(None), False),
    ):
        with pytest.raises(Exception) as caught:
            call()
        assert raised_here(caught.value) is ours


def test_predict_leaves_a_file(tmp_path):
    assert main(tiny("predict")) == 0
    assert (tmp_path / "predictions.jsonl").read_text() == "".join(f'{{"response": "{i}"}}\n' for i in range(4))


def test_the_users_callbacks_replace_the_defaults():
    def kinds(*args: str) -> list[str]:
        return [type(c).__name__ for c in build(tiny(*args)).trainer.callbacks]

    own = ("--trainer.callbacks+=JSONLWriter", "--trainer.callbacks.path=mine.jsonl")
    assert kinds("predict").count("JSONLWriter") == 1
    assert kinds("predict", *own).count("JSONLWriter") == 1
    assert "LeanProgressBar" in kinds("fit", "--trainer.enable_progress_bar=true")
    assert "LeanProgressBar" not in kinds("fit", "--trainer.enable_progress_bar=true", "--trainer.callbacks+=RichProgressBar")
    assert "LeanProgressBar" not in kinds("fit")
    writer = next(c for c in build(tiny("predict", *own)).trainer.callbacks if type(c).__name__ == "JSONLWriter")
    assert writer.path == "mine.jsonl"


def test_the_command_line_wins_over_a_checkpoint(tmp_path):
    assert main(tiny("fit", "--model.rate=0.25", "--trainer.max_epochs=1")) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["rate"] == 0.25
    assert build(tiny("fit", "--model.rate=0.5", f"--ckpt_path={checkpoint}")).model.rate == 0.5
    # Lightning would take 0.25. The name that we override is private: if it goes, this line says so.
    assert "_parse_ckpt_path" in vars(LightningCLI) and "_parse_ckpt_path" in vars(CLI)
    assert "_run_subcommand" in vars(LightningCLI)


def test_quickstart_is_passed_on(monkeypatch):
    import lit_rlhf.quickstart.run
    from lit_rlhf.__main__ import main

    seen = []
    monkeypatch.setattr(lit_rlhf.quickstart.run, "main", lambda args: seen.append(args) or 7)
    assert main(["quickstart", "--seed", "3"]) == 7 and seen == [["--seed", "3"]]


def test_print_config_can_be_fed_back(capsys, model_dir):
    args = [*PPO, f"--model.model={model_dir}", f"--model.reward_model={model_dir}", "--model.kl_coef=0.2"]
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    assert end.value.code in (0, None)
    with open("printed.yaml", "w") as file:
        file.write(capsys.readouterr().out)
    assert build(["fit", "--config=printed.yaml"]).model.kl_coef == 0.2


def test_python_m():
    root = {"PYTHONPATH": str(cli.PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-m", "lit_rlhf", "fit", "--modle=PPO"], capture_output=True, text=True, env=os.environ | root)
    assert done.returncode == 2 and done.stderr.startswith("lit-rlhf: error: ") and done.stderr.count("\n") == 1


def test_one_line_of_several():
    assert one_line(ValueError("first\n  second")) == "first; second"
    assert one_line(KeyError()) == "KeyError"


def test_config_dir_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "lit_rlhf/_configs").mkdir(parents=True)
    monkeypatch.setattr(cli, "PACKAGE", tmp_path / "lit_rlhf")
    assert config_dir() == tmp_path / "lit_rlhf/_configs"


def test_help_names_every_command(capsys):
    """Every parser of the package that calls itself `lit-rlhf something` stands in --help, and `lit-rlhf something --help` reaches it."""
    package = cli.PACKAGE
    names = {name for path in package.rglob("*.py") for name in re.findall(r'prog="lit-rlhf ([a-z-]+)"', path.read_text(encoding="utf-8"))}
    assert {"quickstart", "doctor", "inspect", "learning-curve"} <= names == set(cli.APART)
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, (module, what) in cli.APART.items():
        assert f"`lit-rlhf {name}` {what}" in said
        with pytest.raises(SystemExit):
            apart([name, "--help"])
        assert f"lit-rlhf {name}" in capsys.readouterr().out, module
