"""Two gloo ranks under DDP give one process's texts, losses, metrics and weights, in ILQL, RFT, Quark and NLPO; sharding is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from ranks import finish, start

import lit_rlhf
from lit_rlhf import ILQL, NLPO, RFT, Quark

SCRIPT = Path(__file__).parent / "two_ranks_family.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_dir, reward_dir) -> tuple[dict, list[dict]]:
    """What one process found, and what each of two ranks did."""
    path = tmp_path_factory.mktemp("ranks")
    finish(start(1, [sft_dir, reward_dir, str(path / "one")], SCRIPT) + start(2, [sft_dir, reward_dir, str(path / "two")], SCRIPT))
    one, *two = [torch.load(path / name, weights_only=True) for name in ("one.0", "two.0", "two.1")]
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ilql", "rft", "quark", "nlpo"])
def test_losses_metrics_texts_and_weights(runs, name):
    """After 6 optimiser steps, which for all but ILQL are 3 iterations."""
    one, ranks = runs[0][name], [rank[name] for rank in runs[1]]
    assert len(one["steps"]) == 6 and one["steps"][0] != one["steps"][1]
    assert len(set(one.get("texts", range(9)))) > 8
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], one["weights"], atol=1e-5, rtol=0)
        for a, b in zip(rank["steps"], one["steps"], strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
        assert rank["validation"] == pytest.approx(one["validation"], abs=1e-5) and len(one["validation"]) > 5
        assert rank.get("texts") == one.get("texts")
    if name == "rft":  # 15 prompts are 7 and 8: the parts' means are over all responses, not over ranks
        assert ranks[0]["parts"] == ranks[1]["parts"] == pytest.approx(one["parts"], abs=1e-5)


@pytest.mark.parametrize("kind", [ILQL, RFT, Quark, NLPO])
def test_sharded_strategies_are_refused(kind, sft_dir, monkeypatch):
    home = vars(lit_rlhf.modules)[kind.__name__.lower()]
    for name in ("check_strategy", "check_run"):  # which look at more of a Trainer
        monkeypatch.setattr(home, name, lambda *args, **kwargs: None, raising=False)
    module = kind(sft_dir, reward_fn=lambda prompts, responses: [0.0] * len(prompts))
    module._trainer = SimpleNamespace(strategy=FSDPStrategy(), world_size=1)
    with pytest.raises(ValueError, match=f"{kind.__name__} reads its networks' states.*use one device or ddp"):
        module.setup("fit")
