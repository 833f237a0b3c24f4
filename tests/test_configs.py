"""Every shipped YAML file goes through the real parser, says only what differs from a default, and fits the files of the other stages."""

import inspect
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

import lit_rlhf.callbacks
import lit_rlhf.data
import lit_rlhf.modules
from lit_rlhf.cli import CLI, build, config_dir

CONFIGS = config_dir()
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
OVERLAYS = [name for name in FILES if "model" not in yaml.safe_load((CONFIGS / name).read_text())]
RUNS = [name for name in FILES if name not in OVERLAYS]
FAMILIES = sorted({str(Path(name).parent) for name in RUNS} - {"quickstart"})  # which gets its directories on the command line


class ParseOnly(CLI):
    def instantiate_classes(self) -> None:
        """Stops before a model is looked for."""


def parse(*names: str, more: tuple[str, ...] = ()):
    config = build(["fit", *(f"--config={CONFIGS / name}" for name in names), *more], ParseOnly).config
    return config["fit"]


def given(name: str) -> dict:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


def test_what_was_found():
    assert len(FILES) == sum(1 for path in CONFIGS.rglob("*") if path.is_file()), "configs/ holds YAML files only, all ending in .yaml"
    stages = {f"{family}/{stage}.yaml" for family in ("quickstart", "tldr", "tldr/gptj", "local") for stage in ("sft", "reward", "ppo")}
    assert stages <= set(RUNS)
    assert {f"strategy/{name}.yaml" for name in ("ddp", "fsdp", "fsdp1", "multinode", "slurm")} | {"profile.yaml"} <= set(OVERLAYS)


@pytest.mark.parametrize("name", RUNS)
def test_parses(name):
    config = parse(name)
    for part in ("model", "data"):
        for key, value in given(name)[part].get("init_args", {}).items():
            parsed = config[part].init_args[key]
            if not isinstance(value, dict | list):
                assert parsed == value, f"{name}: {part}.{key} is {value!r} in the file and {parsed!r} once parsed"


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", ["tldr/sft.yaml", "tldr/reward.yaml", "tldr/ppo.yaml"])
def test_overlays_parse_over_a_run(overlay, name):
    config, alone = parse(name, overlay), parse(name)
    for key, value in given(overlay)["trainer"].items():
        if not isinstance(value, dict | list):
            assert config.trainer[key] == value
    assert config.model == alone.model and config.data == alone.data
    added = [f"lit_rlhf.{c['class_path']}" for c in given(overlay)["trainer"].get("callbacks+", [])]
    assert [c.class_path for c in config.trainer.callbacks] == [*(c.class_path for c in alone.trainer.callbacks), *added]


def default_of(owner: type, key: str):
    return inspect.signature(owner).parameters[key].default


@pytest.mark.parametrize("name", FILES)
def test_only_what_differs_from_the_default(name):
    config = given(name)
    for key, value in config["trainer"].items():
        if key.endswith("+"):
            continue
        assert value != default_of(Trainer, key), f"{name}: trainer.{key}: {value} is the default"
    holders = {"model": lit_rlhf.modules, "data": lit_rlhf.data}
    parts = [(holders[part], config[part]) for part in holders if part in config]
    parts += [
        (lit_rlhf.callbacks, item) for item in config["trainer"].get("callbacks", []) if hasattr(lit_rlhf.callbacks, item["class_path"])
    ]
    for holder, part in parts:
        for key, value in part.get("init_args", {}).items():
            assert value != default_of(getattr(holder, part["class_path"]), key), (
                f"{name}: {part['class_path']}.{key}: {value} is the default"
            )


def test_slurm_leaves_requeuing_to_the_batch_script():
    plugin = parse("tldr/ppo.yaml", "strategy/multinode.yaml", "strategy/slurm.yaml").trainer.plugins[0]
    assert plugin.class_path.endswith(".SLURMEnvironment") and plugin.init_args.auto_requeue is False


@pytest.mark.parametrize("name", RUNS)
def test_begins_with_a_comment(name):
    assert (CONFIGS / name).read_text().startswith("# ")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_reads_what_the_stages_before_it_export(family):
    sft, reward, ppo = (given(f"{family}/{stage}.yaml") for stage in ("sft", "reward", "ppo"))

    def exported(config: dict) -> str:
        return next(c["init_args"]["dirpath"] for c in config["trainer"]["callbacks"] if c["class_path"] == "ExportHF")

    assert reward["model"]["init_args"]["model"] == ppo["model"]["init_args"]["model"] == exported(sft)
    assert ppo["model"]["init_args"]["reward_model"] == exported(reward)
    for config in (sft, reward, ppo):
        assert exported(config) == f"{config['trainer']['default_root_dir']}/hf"


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith("ppo.yaml")])
def test_ppo_checkpoints_and_steps_fit_its_iterations(name):
    config = parse(name)
    ppo, trainer = config.model.init_args, config.trainer
    steps = ppo.ppo_epochs * ppo.minibatches
    assert trainer.log_every_n_steps % steps == 0, f"{name}: log_every_n_steps should be a multiple of the {steps} steps of an iteration"
    assert trainer.limit_train_batches in (None, 1.0)
    for callback in trainer.callbacks:
        if callback.class_path.endswith("ModelCheckpoint"):
            assert callback.init_args.every_n_train_steps % steps == 0


def test_papers_settings():
    # Huang et al. 2024: learning rate 3e-6, AdamW eps 1e-5, batches 128 / 64 / 512, KL coefficient 0.05, 53 tokens at 0.7, 4 epochs
    # of 1 minibatch, one million episodes
    sft, reward, ppo = (parse(f"tldr/{stage}.yaml") for stage in ("sft", "reward", "ppo"))
    for config, shape in ((sft, "cosine"), (reward, "cosine"), (ppo, "linear")):
        optimizer = config.model.init_args.optimizer
        assert (optimizer.class_path, optimizer.init_args.lr, optimizer.init_args.eps) == ("torch.optim.AdamW", 3e-6, 1e-5)
        assert config.model.init_args.scheduler.shape == shape
    assert (sft.data.init_args.batch_size, reward.data.init_args.batch_size, ppo.model.init_args.batch_size) == (128, 64, 512)
    args = ppo.model.init_args
    assert (args.kl_coef, args.kl_target, args.ppo_epochs, args.minibatches, args.value_coef) == (0.05, None, 4, 1, 0.1)
    assert (args.sampling.max_new_tokens, args.sampling.temperature, args.gamma, args.lam) == (53, 0.7, 1.0, 0.95)
    assert (sft.trainer.max_epochs, reward.trainer.max_epochs) == (1, 1)
    assert ppo.trainer.max_epochs * args.batch_size == pytest.approx(1_000_000, rel=1e-3)


def test_an_option_wins_over_files_and_a_later_file_over_an_earlier(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("trainer:\n  max_epochs: 7\nmodel:\n  init_args:\n    kl_coef: 0.3\n")
    config = build(
        ["fit", f"--config={CONFIGS / 'tldr/ppo.yaml'}", f"--config={overlay}", "--trainer.max_epochs=9", "--model.lam=0.9"], ParseOnly
    ).config["fit"]
    assert (config.trainer.max_epochs, config.model.init_args.kl_coef, config.model.init_args.lam) == (9, 0.3, 0.9)
    assert config.model.init_args.reward_model == "runs/tldr/reward/hf"
