"""Job: what a run computes and on how many devices, read from the same YAML files and options as `fit`, without building anything."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lit_rlhf.modules
from lit_rlhf import cli

PRECISIONS = {"32-true": "32-true", "32": "32-true", "bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed", "bf16-true": "bf16-true"}
STAGES = {"SFT": "sft", "PairwiseReward": "reward", "PPO": "ppo"}
STRATEGIES = {"ddp": "ddp", "ModelParallelStrategy": "fsdp", "DDPStrategy": "ddp", "fsdp": "fsdp", "FSDPStrategy": "fsdp"}
RESPONSE_TOKENS = 53  # where nothing says how long responses are: Sampling's default, the longest that Huang et al. 2024 sample


@dataclass(frozen=True)
class Job:
    """One run: its model, data sizes, Trainer settings and devices."""

    stage: str
    """"sft", "reward" or "ppo"."""
    model: Any
    """The module's init_args, as parsed."""
    strategy: str
    """"single", "ddp" or "fsdp" (FSDP2, and FSDP1, which gathers the same blocks)."""
    precision: str
    devices: int
    """Per node."""
    nodes: int
    accumulate: int
    clip: float | None
    max_steps: int
    max_epochs: int | None
    batch_size: int
    """Of one optimiser step (PPO: responses of one iteration), over all ranks."""
    val_batch_size: int
    prompt_tokens: int
    response_tokens: int
    responses: int
    """Responses per prompt."""
    prompt_loss: bool = False
    rows: int | None = None
    """Training rows, where known."""
    accelerator: str = "gpu"
    keeps_gradients: bool = False
    """Whether PPO's rollouts still hold the last step's gradients: only before a validation does Lightning drop them."""
    notes: list[str] = field(default_factory=list)
    """Assumptions, in words."""

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimiser step, over all ranks."""
        if self.stage != "ppo":
            return self.batch_size
        return max(self.batch_size // self.responses // self.model.minibatches, 1)

    @property
    def micro_prompts(self) -> int:
        """Prompts of one rank's micro-batch."""
        return -(-self.prompts_per_step // (self.accumulate * self.world))

    @property
    def tree_tokens(self) -> int:
        """Tokens of a prompt and its responses, as they are packed."""
        return self.prompt_tokens + self.responses * self.response_tokens

    @property
    def splits(self) -> bool:
        """Whether every rank and micro-batch gets a prompt."""
        return self.prompts_per_step >= self.accumulate * self.world


class ParseOnly(cli.CLI):
    """The command line's parser alone."""

    def instantiate_classes(self) -> None:
        """Stops before a model is looked for."""


def read_job(args: Sequence[str], options: Any) -> Job:
    """The Job of `fit` with these arguments.

    Args:
        options: devices, nodes, prompt_tokens, response_tokens, responses and rows (None: as the files say), accelerator.

    Raises ValueError for what `plan` cannot plan, cli.Refused for what the parser refuses.
    """
    config = cli.build(["fit", *args], ParseOnly).config["fit"]
    stage = _stage(config)
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    notes: list[str] = []
    devices, nodes = _devices(trainer, options)
    accumulate = trainer.accumulate_grad_batches or 1
    batch_size = model.batch_size if stage == "ppo" else data.batch_size
    responses = {"sft": 1, "reward": options.responses or 2, "ppo": getattr(model, "responses_per_prompt", 1)}[stage]
    return Job(
        stage=stage,
        model=model,
        strategy=_strategy(trainer, devices * nodes),
        precision=_precision(trainer.precision),
        devices=devices,
        nodes=nodes,
        accumulate=accumulate,
        clip=trainer.gradient_clip_val,
        max_steps=trainer.max_steps,
        max_epochs=trainer.max_epochs,
        batch_size=batch_size,
        val_batch_size=getattr(data, "val_batch_size", None) or max(batch_size // accumulate, 1),
        prompt_tokens=_prompt_tokens(data, options, notes),
        response_tokens=_response_tokens(stage, model, data, options, notes),
        responses=responses,
        prompt_loss=bool(getattr(data, "prompt_loss", False)),
        rows=options.rows or _rows(data),
        keeps_gradients=trainer.check_val_every_n_epoch not in (None, 1) or trainer.limit_val_batches == 0,
        accelerator=options.accelerator or ("cpu" if trainer.accelerator == "cpu" else "gpu"),
        notes=notes,
    )


def _stage(config: Any) -> str:
    name = str(config.model.class_path).rsplit(".", 1)[-1]
    if name not in STAGES or not hasattr(lit_rlhf.modules, name):
        raise ValueError(f"plan knows {', '.join(STAGES)}, not {config.model.class_path}: give the YAML file of one of these stages")
    return STAGES[name]


def _devices(trainer: Any, options: Any) -> tuple[int, int]:
    given = trainer.devices
    if options.devices is None and not str(given).isdigit() and given not in ("auto", -1, "-1", None):
        raise ValueError(f"trainer.devices is {given!r}; say how many devices a node has: --devices N")
    devices = options.devices if options.devices is not None else int(given) if str(given).isdigit() else 1
    nodes = options.nodes if options.nodes is not None else int(trainer.num_nodes or 1)
    if devices < 1 or nodes < 1:
        raise ValueError(f"--devices {devices} --nodes {nodes}: both must be at least 1")
    return devices, nodes


def _strategy(trainer: Any, world: int) -> str:
    given = trainer.strategy
    name = str(getattr(given, "class_path", given)).rsplit(".", 1)[-1]
    known = STRATEGIES.get(name) or ("ddp" if name.startswith("ddp") else "fsdp" if name.startswith("fsdp") else None)
    if known is None and name not in ("auto", "None"):
        raise ValueError(f"plan knows the strategies auto, ddp, fsdp and ModelParallelStrategy, not trainer.strategy {name!r}")
    if world == 1:
        return "single"
    return known or "ddp"


def _precision(given: Any) -> str:
    name = "32-true" if given is None else str(given)
    if name not in PRECISIONS:
        raise ValueError(f"plan knows the precisions 32-true, bf16-mixed and bf16-true, not trainer.precision {name!r}")
    return PRECISIONS[name]


def _prompt_tokens(data: Any, options: Any, notes: list[str]) -> int:
    if options.prompt_tokens is not None:
        return options.prompt_tokens
    notes.append(f"every prompt has data.max_prompt_tokens = {data.max_prompt_tokens} tokens (--prompt_tokens N for another length)")
    return int(data.max_prompt_tokens)


def _response_tokens(stage: str, model: Any, data: Any, options: Any, notes: list[str]) -> int:
    if options.response_tokens is not None:
        return options.response_tokens
    if stage == "ppo":
        notes.append(f"every response has sampling.max_new_tokens = {model.sampling.max_new_tokens} tokens")
        return int(model.sampling.max_new_tokens)
    if data.max_response_tokens is not None:
        notes.append(f"every response has data.max_response_tokens = {data.max_response_tokens} tokens")
        return int(data.max_response_tokens)
    notes.append(f"every response has {RESPONSE_TOKENS} tokens: no max_response_tokens is set (--response_tokens N for another length)")
    return RESPONSE_TOKENS


def _rows(data: Any) -> int | None:
    """The training rows: limit_train_rows, else the lines of a local jsonl file; None where that does not say."""
    if data.limit_train_rows is not None:
        return int(data.limit_train_rows)
    path = Path(str(data.data))
    if not path.name.endswith((".jsonl", ".jsonl.gz")) or not path.is_file():
        return None
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
