"""configs/strategy/multinode.yaml as two 'nodes' of one process each on this host, under two torchrun agents, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import free_port
from safetensors.torch import load_file
from two_ranks import ROWS

from lit_rlhf import cli

pytestmark = pytest.mark.slow  # two agents and two processes, about 30 s of two idle cores
OVERLAY = cli.config_dir() / "strategy" / "multinode.yaml"


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory, sft_dir, reward_dir) -> Path:
    """Three iterations of PPO, with a checkpoint at the end of each and an export."""
    path = tmp_path_factory.mktemp("multinode")
    (path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in ROWS))
    keeper = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "checkpoints", "every_n_train_steps": 1, "save_last": "link"}}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    ppo = {"model": sft_dir, "reward_model": reward_dir, "batch_size": 8, "ppo_epochs": 1}
    sampling = {"class_path": "lit_rlhf.generation.Sampling", "init_args": {"max_new_tokens": 8, "temperature": 1.0}}
    constant = {"class_path": "lit_rlhf.optim.Schedule", "init_args": {"shape": "constant"}}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 3, "callbacks": [keeper, export("hf")], **quiet},
        "model": {"class_path": "PPO", "init_args": {**ppo, "sampling": sampling, "optimizer": sgd, "scheduler": constant}},
        "data": {"class_path": "PromptDataModule", "init_args": {"data": str(path / "prompts.jsonl")}},
    }
    (path / "run.yaml").write_text(yaml.safe_dump(config))
    return path / "run.yaml"


def export(name: str) -> dict:
    return {"class_path": "ExportHF", "init_args": {"dirpath": name}}


def two_nodes(run: Path, place: Path, *more: str) -> list[str]:
    """Runs `lit-rlhf fit` under two torchrun agents in `place`; returns what the nodes wrote to stderr."""
    overrides = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--ckpt_path=last"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", place.name]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    place.mkdir(exist_ok=True)
    command = [*torchrun, "-m", "lit_rlhf", "fit", f"--config={run}", f"--config={OVERLAY}", *overrides, *more]
    nodes = [subprocess.Popen(command, env=env, cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(2)]
    try:
        said = [node.communicate(timeout=300)[1] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    finally:
        for node in nodes:
            node.kill()
    return said


def test_two_nodes_give_one_process_weights_and_a_requeue_goes_on(run_yaml, sft_dir, tmp_path, monkeypatch):
    """The second start finds the first one's last checkpoint by the same command line, as a requeued job does."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", f"--config={run_yaml}"]) == 0
    said = two_nodes(run_yaml, tmp_path / "two", "--trainer.max_steps=2")
    assert "2 processes" in said[0] + said[1]
    assert not any("Restored all states" in text for text in said)
    said = two_nodes(run_yaml, tmp_path / "two")
    assert any("Restored all states" in text for text in said)
    for name in ("policy", "value"):
        one, two = (load_file(place / "hf" / name / "model.safetensors") for place in (tmp_path, tmp_path / "two"))
        largest = max(float((one[key] - two[key]).abs().max()) for key in one)
        print(f"\n{name}: two nodes against one process {largest:.1e}")
        assert largest < 1e-5
    start = load_file(Path(sft_dir) / "model.safetensors")
    trained = load_file(tmp_path / "hf" / "policy" / "model.safetensors")
    assert max(float((trained[key] - start[key]).abs().max()) for key in trained) > 1e-3
