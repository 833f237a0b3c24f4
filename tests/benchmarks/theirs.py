"""One measuring process of TRL, in an environment of its own: the same weights, rows, batch, optimiser, dtype and threads as ours.py.

.bench/trl-1.16.0/bin/python tests/benchmarks/theirs.py sft --work .bench/work      (reward, dpo, rloo)
.bench/trl-1.12.0/bin/python tests/benchmarks/theirs.py ppo --work .bench/work
"""

import json
import os
import warnings
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import job
import measuring
import torch
import transformers
from job import Job
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


class Watch(TrainerCallback):
    """Marks the end of every step."""

    def __init__(self, clock: measuring.Clock) -> None:
        self.clock, self.loaded = clock, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.loaded = measuring.reset_peak()
        self.clock.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.mark()


def arguments(run: Job) -> dict[str, Any]:
    """TrainingArguments of every trainer: what it would do beside the work is off, as in ours."""
    return {
        "output_dir": str(run.work / "trl"),
        "per_device_train_batch_size": run.batch,
        "learning_rate": job.LEARNING_RATE,
        "adam_epsilon": job.EPS,
        "weight_decay": job.WEIGHT_DECAY,
        "lr_scheduler_type": "constant",
        "bf16": run.precision == "bf16",  # TRL's default is True
        "gradient_checkpointing": False,  # TRL's default is True
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": job.SEED,
    }


def rows_of(run: Job) -> datasets.Dataset:
    with open(run.work / f"{run.data}.trl.jsonl") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines])


def load(run: Job, name: str) -> Any:
    auto = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
    return auto.from_pretrained(run.work / name, dtype=torch.float32)


def first_of(inputs: dict[str, Any], loss_tokens: int) -> dict[str, Any]:
    """What the first batch holds, as ours.py says it."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    return {"ids": measuring.hash_ids(rows), "tokens": sum(map(len, rows)), "loss_tokens": loss_tokens}


def tap(trainer: Any) -> tuple[list[float], dict[str, Any]]:
    """Keeps every loss and the first batch that the trainer computes a loss for."""
    losses: list[float] = []
    first: dict[str, Any] = {}
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not first and "input_ids" in inputs:
            labels = inputs.get("labels")
            first.update(first_of(inputs, int((labels != -100).sum()) if labels is not None else 0))
        out = inner(model, inputs, *args, **kwargs)
        losses.append(float((out[0] if isinstance(out, tuple) else out).detach()))
        return out

    trainer.compute_loss = compute_loss
    return losses, first


def steps_of(run: Job) -> dict[str, Any]:
    """What the trainers of rows share: the number of steps, and the rows in the order of the file, uncut."""
    return {"max_steps": run.warm_up + run.steps, "max_length": None, "train_sampling_strategy": "sequential"}


def sft(run: Job, watch: Watch, tokenizer: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**arguments(run), **steps_of(run))
    return SFTTrainer(load(run, "policy"), config, train_dataset=rows_of(run), processing_class=tokenizer, callbacks=[watch])


def reward(run: Job, watch: Watch, tokenizer: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(**arguments(run), **steps_of(run))
    return RewardTrainer(load(run, "reward"), config, train_dataset=rows_of(run), processing_class=tokenizer, callbacks=[watch])


def dpo(run: Job, watch: Watch, tokenizer: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    networks = {"model": load(run, "policy"), "ref_model": load(run, "policy")}
    config = DPOConfig(**arguments(run), **steps_of(run), beta=job.BETA["dpo"])
    return DPOTrainer(**networks, args=config, train_dataset=rows_of(run), processing_class=tokenizer, callbacks=[watch])


def rloo(run: Job, watch: Watch, tokenizer: Any) -> Any:
    """One optimiser step on one set of responses, `--responses` of them for each prompt."""
    from trl import RLOOConfig, RLOOTrainer

    watch.clock.watch(RLOOTrainer, "_generate", "sampling")
    watch.clock.watch(RLOOTrainer, "_calculate_rewards", "reward model")
    with open(run.work / f"{run.data}.jsonl") as lines:
        prompts = datasets.Dataset.from_list([json.loads(line) for line in lines])
    config = RLOOConfig(
        **arguments(run),
        max_steps=run.warm_up + run.steps,
        num_generations=run.responses,
        max_completion_length=job.NEW_TOKENS,
        temperature=job.TEMPERATURE,
        beta=job.BETA["rloo"],
    )
    judge = {"reward_funcs": load(run, "reward"), "reward_processing_classes": tokenizer}
    return RLOOTrainer(load(run, "policy"), args=config, train_dataset=prompts, processing_class=tokenizer, callbacks=[watch], **judge)


def ppo(run: Job, watch: Watch, tokenizer: Any) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    if run.precision == "bf16":  # PPOTrainer makes an Accelerator of its own and does not tell it of args.bf16
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    watch.clock.watch(ppo_trainer, "batch_generation", "sampling")
    watch.clock.watch(ppo_trainer, "get_reward", "values and reward model")
    with open(run.work / f"{run.data}.jsonl") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    tokenizer.padding_side = "left"
    config = PPOConfig(
        **arguments(run),
        total_episodes=run.batch * (run.warm_up + run.steps),
        num_ppo_epochs=job.PPO_EPOCHS,
        num_mini_batches=1,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=run.batch,
        response_length=job.NEW_TOKENS,
        temperature=job.TEMPERATURE,
        stop_token="eos",
        num_sample_generations=0,
    )
    ids = datasets.Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]})
    networks = {"ref_model": load(run, "policy"), "reward_model": load(run, "reward"), "value_model": load(run, "reward")}
    return PPOTrainer(config, tokenizer, load(run, "policy"), **networks, train_dataset=ids, callbacks=[watch])


@torch.no_grad()
def check(run: Job, tokenizer: Any) -> None:
    """Log-probs, values and scores of given responses, by the functions that PPOTrainer calls, in its left-padded rows."""
    from trl.experimental.ppo.ppo_trainer import forward, get_reward, selective_log_softmax

    with open(run.work / f"{run.data}.jsonl") as lines:
        prompts = tokenizer([json.loads(line)["prompt"] for line in lines], padding=True, padding_side="left", return_tensors="pt")
    pad, responses = tokenizer.pad_token_id, job.check_responses(len(prompts["input_ids"]), len(tokenizer), tokenizer.eos_token_id)
    response = torch.tensor([row + [pad] * (job.NEW_TOKENS - len(row)) for row in responses])
    rows, start, mask = torch.cat([prompts["input_ids"], response], 1), prompts["input_ids"].shape[1], response != pad
    logits = forward(load(run, "policy"), rows, pad).logits[:, start - 1 : -1] / (job.TEMPERATURE + 1e-7)
    scalars, scores, _ = get_reward(load(run, "reward"), rows, pad, start)
    dump = {"logprobs": selective_log_softmax(logits, response) * mask, "values": scalars[:, start - 1 : -1].squeeze(-1) * mask}
    torch.save(dump | {"mask": mask, "scores": scores}, run.out)


@torch.no_grad()
def check_dpo(run: Job, tokenizer: Any) -> None:
    """The losses of the first batch by DPOTrainer, its policy moved away from the reference."""
    from trl import DPOConfig, DPOTrainer

    dump = {}
    for kind in ("sigmoid", "ipo"):
        networks = {"model": measuring.move(load(run, "policy"), 5e-3, 1), "ref_model": load(run, "policy")}
        config = DPOConfig(**arguments(run), **steps_of(run), loss_type=[kind], beta=job.BETA["dpo"])
        trainer = DPOTrainer(**networks, args=config, train_dataset=rows_of(run), processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        dump |= {kind: trainer.compute_loss(trainer.model, batch), "tokens": batch["completion_mask"].sum()}
    torch.save(dump, run.out)


@torch.no_grad()
def check_rloo(run: Job, tokenizer: Any) -> None:
    """Advantages of given responses and scores by RLOOTrainer, and its loss after the policy has moved on."""
    k = run.responses
    with open(run.work / f"{run.data}.jsonl") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines for _ in range(k)]
    responses = job.check_responses(len(prompts), len(tokenizer), tokenizer.eos_token_id)
    trainer = rloo(run, Watch(measuring.Clock()), tokenizer)
    measuring.move(trainer.model, 1e-3, 1)
    trainer._generate = lambda _: (tokenizer(prompts)["input_ids"], responses, tokenizer.batch_decode(responses))
    trainer._calculate_rewards = lambda *_: torch.tensor(job.check_scores(responses))[:, None]
    made = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    measuring.move(trainer.model, 3e-4, 2)
    loss = trainer.compute_loss(trainer.model, made)
    torch.save({"loss": loss, "advantages": made["advantages"], "logprobs": made["old_logps"]}, run.out)


def main() -> None:
    run = job.parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    measuring.set_threads(run)
    tokenizer = AutoTokenizer.from_pretrained(run.work / "policy")
    if run.stage.startswith("check"):
        return {"check": check, "check_dpo": check_dpo, "check_rloo": check_rloo}[run.stage](run, tokenizer)
    clock = measuring.Clock()
    measuring.watch_gc(clock)
    watch = Watch(clock)
    trainer = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "rloo": rloo}[run.stage](run, watch, tokenizer)
    losses, first = tap(trainer)
    measuring.profiled(run, trainer.train)
    measuring.emit(
        run,
        measuring.result(
            run, "trl", clock, watch.loaded, run.batch, losses=losses, first=first, mixed_precision=trainer.accelerator.mixed_precision
        ),
    )


if __name__ == "__main__":
    main()
