import importlib
import sys

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, IterableDataset

from lit_rlhf.optim import Schedule, fix_max_steps, fuse


def learning_rates(schedule, total, lr=1.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates, optimizer.param_groups[0]["lr"]


def test_linear_is_that_of_summarize_from_feedback_details():
    # lr * (1 - (u - 1) / U) for update u = 1..4
    rates, after = learning_rates(Schedule("linear"), 4, lr=2.0)
    assert rates == [2.0, 1.5, 1.0, 0.5] and after == 0.0


def test_the_other_shapes_by_hand():
    assert learning_rates(Schedule("constant"), 3) == ([1.0, 1.0, 1.0], 1.0)
    # (1 + cos(0, 60, 120 degrees)) / 2
    rates, after = learning_rates(Schedule("cosine"), 3)
    assert rates == pytest.approx([1.0, 0.75, 0.25]) and after == pytest.approx(0.0)
    assert Schedule() == Schedule("cosine", warmup_steps=0, final=0.0)


def test_final_is_where_the_decay_ends():
    # .2 + .8 * (1, .5) ; cosine at half way is .5 as well
    for shape in ("linear", "cosine"):
        rates, after = learning_rates(Schedule(shape, final=0.2), 2)
        assert rates == pytest.approx([1.0, 0.6]) and after == pytest.approx(0.2)


def test_warmup_by_hand():
    # W 3: 1/4, 2/4, 3/4, then linear over the 2 steps left: 1, 1/2; no step is spent at a rate of 0
    assert learning_rates(Schedule("linear", warmup_steps=3), 5) == (pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5]), 0.0)
    assert learning_rates(Schedule("constant", warmup_steps=1), 3)[0] == [0.5, 1.0, 1.0]


def test_steps_past_the_end_stay_at_the_final_rate():
    schedule = Schedule("linear", final=0.25)
    assert schedule.share(7, 4) == 0.25 and schedule.share(0, 0) == 1.0


def test_a_warmup_longer_than_the_run_warns():  # not an error, for fast_dev_run has one step
    with pytest.warns(UserWarning, match="warmup_steps=3"):
        assert learning_rates(Schedule("cosine", warmup_steps=3), 2)[0] == [0.25, 0.5]


def test_bad_settings_are_named():
    for setting, message in (({"shape": "lin"}, "shape"), ({"warmup_steps": -1}, "warmup_steps"), ({"final": 1.5}, "final 1.5")):
        with pytest.raises(ValueError, match=message):
            Schedule(**setting)


def test_the_schedules_state_is_plain_data():  # so that a checkpoint loads with weights_only=True
    scheduler = Schedule("linear", warmup_steps=1)(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 9)
    assert scheduler.state_dict()["lr_lambdas"] == [None]


class Tiny(L.LightningModule):
    def __init__(self, batches=6):
        super().__init__()
        self.weight, self.batches, self.total, self.epoch_ends, self.validations = torch.nn.Parameter(torch.ones(1)), batches, None, 0, 0

    def training_step(self, batch, batch_idx):
        return self.weight.sum() ** 2

    def validation_step(self, batch, batch_idx):
        self.validations += 1

    def on_train_epoch_end(self):
        self.epoch_ends += 1

    def train_dataloader(self):
        return DataLoader(range(self.batches))

    def val_dataloader(self):
        return DataLoader(range(1))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.total = fix_max_steps(self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Schedule("linear")(optimizer, self.total), "interval": "step"}}


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def fit(module=None, **setting):
    module = module or Tiny()
    trainer = L.Trainer(**QUIET, num_sanity_val_steps=0, **setting)
    trainer.fit(module)
    return trainer, module


@pytest.mark.parametrize(
    "setting,steps",
    [
        ({"max_epochs": 2}, 12),
        ({"max_steps": 3}, 3),
        ({"max_steps": 9}, 9),  # in the second epoch
        ({"max_epochs": 1, "max_steps": 50}, 6),
        ({"max_epochs": 2, "max_steps": 4}, 4),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4),  # ceil(6 / 4) a epoch
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 3, "overfit_batches": 2}, 6),
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"fast_dev_run": 3, "accumulate_grad_batches": 2}, 2),
    ],
    ids=str,
)
def test_a_fit_ends_by_steps(setting, steps):
    trainer, module = fit(**setting)
    assert module.total == steps and trainer.global_step == steps
    assert trainer.max_steps == steps and trainer.max_epochs == -1
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)  # the linear schedule has come to its end


def test_every_epoch_is_ended_and_validated():
    trainer, module = fit(max_epochs=2)
    assert module.epoch_ends == 2 and module.validations == 2 and trainer.current_epoch == 2


@pytest.mark.parametrize("setting", [{"max_epochs": 0}, {"limit_train_batches": 0, "max_epochs": 2}, {"max_steps": 0}], ids=str)
def test_a_fit_without_steps_stays_without(setting):
    trainer, module = fit(**setting)
    assert trainer.global_step == 0 and not module.total


class Endless(IterableDataset):
    def __iter__(self):
        yield from iter(int, 1)


def test_no_end_in_sight():
    with pytest.raises(ValueError, match=r"max_steps=-1, max_epochs=-1.*Set trainer.max_steps"):
        fit(max_epochs=-1)

    class Stream(Tiny):
        def train_dataloader(self):
            return DataLoader(Endless())

    with pytest.raises(ValueError, match="inf batches per epoch"):
        fit(Stream(), max_epochs=2)
    trainer, module = fit(Stream(), max_epochs=2, max_steps=3)
    assert trainer.global_step == module.total == 3


def test_a_resume_goes_on_to_the_same_end(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "8.ckpt")

    first, second = Tiny(), Tiny()
    trainer = L.Trainer(**QUIET, max_epochs=2, num_sanity_val_steps=0, callbacks=Save())
    trainer.fit(first)
    again = L.Trainer(**QUIET, max_epochs=2, num_sanity_val_steps=0, callbacks=Save())
    again.fit(second, ckpt_path=tmp_path / "8.ckpt")
    assert again.global_step == trainer.global_step == 12 and second.total == 12
    assert second.weight.item() == first.weight.item()


MODULE = """
import torch, lightning as L
from lightning.pytorch.cli import OptimizerCallable
from lit_rlhf.optim import LRSchedule, Schedule

def half(optimizer, total_steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)

class Module(L.LightningModule):
    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-6, eps=1e-5),
        scheduler: LRSchedule = Schedule("linear", warmup_steps=2),
    ):
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
"""


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    """Runs the arguments, the YAML first, and returns (optimizer, lr, eps, schedule) of the module that the command line makes."""
    (tmp_path / "module_of_test_optim.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.delitem(sys.modules, "module_of_test_optim", raising=False)
    module = importlib.import_module("module_of_test_optim")

    def run(*args, **model):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        args = ["--config", str(tmp_path / "config.yaml"), *args]
        setting = {"run": False, "seed_everything_default": False, "save_config_callback": None, "auto_configure_optimizers": False}
        made = LightningCLI(module.Module, L.LightningDataModule, args=args, **setting).model
        built = made.optimizer([torch.nn.Parameter(torch.zeros(1))])
        group = dict(built.param_groups[0])
        made.scheduler(built, 10)  # callable as it is
        return type(built).__name__, group["lr"], group.get("eps"), made.scheduler

    return run


def test_the_command_line_takes_schedules(command_line):
    assert command_line() == ("AdamW", 3e-6, 1e-5, Schedule("linear", warmup_steps=2))
    path = {"class_path": "lit_rlhf.optim.Schedule", "init_args": {"shape": "constant"}}
    assert command_line(scheduler=path)[3] == Schedule("constant", warmup_steps=2)
    assert command_line(scheduler={"final": 0.1})[3] == Schedule("linear", warmup_steps=2, final=0.1)
    assert command_line("--model.scheduler.shape", "cosine")[3] == Schedule("cosine", warmup_steps=2)
    assert command_line(scheduler="module_of_test_optim.half")[3].__name__ == "half"
    with pytest.raises(SystemExit):
        command_line("--model.scheduler.shape", "lineer")


def test_the_command_line_changes_one_value_of_the_optimizer(command_line):
    assert command_line(optimizer={"init_args": {"lr": 0.5}})[:3] == ("AdamW", 0.5, 1e-5)
    assert command_line("--model.optimizer", "SGD", "--model.optimizer.lr", "0.25")[:3] == ("SGD", 0.25, None)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_fused_optimiser_takes_the_same_steps(kind):
    gradients = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def steps(optimizer, weight):
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        return weight.detach()

    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(9))
    plain, fused = start.clone().requires_grad_(), start.clone().requires_grad_()
    made = fuse(kind([fused], lr=0.1, weight_decay=0.01))
    assert made.param_groups[0]["fused"] and not getattr(made, "_step_supports_amp_scaling", False)
    torch.testing.assert_close(
        steps(made, fused), steps(kind([plain], lr=0.1, weight_decay=0.01, foreach=False), plain), atol=1e-6, rtol=1e-5
    )


def test_what_the_user_chose_is_not_fused():
    weights = [torch.nn.Parameter(torch.zeros(2))]
    for made in (torch.optim.AdamW(weights, foreach=True), torch.optim.AdamW(weights, fused=False), torch.optim.RMSprop(weights)):
        before = dict(made.param_groups[0])
        assert {k: v for k, v in fuse(made).param_groups[0].items() if k != "params"} == {k: v for k, v in before.items() if k != "params"}
