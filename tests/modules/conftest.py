"""fit_ppo(): a small PPO run whose iterations and steps are written down."""

import pytest
import torch

from lit_rlhf import PPO, PromptDataModule, Sampling, Schedule


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def vowels(prompts, responses):
    """The share of a's and e's in a response, times ten: no model needed, and rows differ."""
    return [10 * sum(c in "ae" for c in r) / (len(r) + 1) for r in responses]


class Recorded(PPO):
    """Keeps each iteration's experience and statistics, and each optimiser step's metrics."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.experiences, self.statistics, self.steps = [], [], []

    def log_dict(self, metrics, *args, **kwargs):
        numbers = {name: float(x) for name, x in metrics.items()}
        if "rollout/score" in numbers:
            self.experiences.append(self.experience)
            self.statistics.append(numbers)
        if "ppo/policy_loss" in numbers:
            self.steps.append(numbers)
        super().log_dict(metrics, *args, **kwargs)


@pytest.fixture
def fit_ppo(make_trainer, sft_dir, sft_rows):
    """fit_ppo(PPO's arguments, data=PromptDataModule's, **Trainer's) -> the module.

    By default 2 iterations of 8 responses, 2 epochs x 2 minibatches.
    """

    def run(settings=None, data=None, callbacks=(), model=None, rows=sft_rows, **kwargs):
        usual = {
            "sampling": Sampling(max_new_tokens=8, temperature=1.0),
            "batch_size": 8,
            "ppo_epochs": 2,
            "minibatches": 2,
            "optimizer": sgd,
            "scheduler": Schedule("constant"),
        }
        settings = usual | (settings or {})
        if "reward_model" not in settings:
            settings.setdefault("reward_fn", vowels)
        module = Recorded(model or sft_dir, **settings)
        trainer = make_trainer(**({"max_steps": 2 * module.steps_per_iteration} | kwargs), callbacks=list(callbacks))
        trainer.fit(module, datamodule=PromptDataModule(rows, **({"max_prompt_tokens": 64, "val_batch_size": 4} | (data or {}))))
        return module

    return run
