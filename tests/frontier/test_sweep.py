"""Sweeps as text: which settings they make and which options those are."""

import pytest

from lit_rlhf.frontier.sweep import option, settings


def test_all_combinations():
    found = settings(["kl_coef=0.01, 0.05", "lr=1e-4"])
    assert [s.name for s in found] == ["kl_coef=0.01 lr=1e-4", "kl_coef=0.05 lr=1e-4"]
    assert found[1].args == ["--model.kl_coef=0.05", "--model.optimizer.init_args.lr=1e-4"]
    assert [s.folder for s in settings(["model=a/b,c d"])] == ["model=a_b", "model=c_d"]


def test_which_have_a_start_of_their_own():
    found = settings(["model=a,b", "kl_coef=0"]) + settings(["model.reward_model=a"]) + settings(["kl_coef=0", "lr=1"]) + settings([])
    assert [s.own_start for s in found] == [True, True, True, False, False]


def test_no_sweep_is_one_setting():
    (only,) = settings([])
    assert (only.name, only.folder, only.args) == ("as configured", "as_configured", [])


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("model", "model.model"),
        ("reward_model", "model.reward_model"),
        ("sampling.temperature", "model.sampling.temperature"),
        ("model.kl_coef", "model.kl_coef"),
        ("trainer.max_epochs", "trainer.max_epochs"),
        ("seed_everything", "seed_everything"),
    ],
)
def test_keys(key, wanted):
    assert option(key) == wanted


@pytest.mark.parametrize("sweep", [["kl_coef"], ["=1"], ["kl_coef="], ["kl_coef=,"]])
def test_refuses_what_is_no_sweep(sweep):
    with pytest.raises(ValueError, match="give a key and its values"):
        settings(sweep)


def test_refuses_a_key_twice():
    with pytest.raises(ValueError, match="names lr twice"):
        settings(["lr=1", "lr=2"])
