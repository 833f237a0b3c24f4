"""A few kills of tests/chaos.py, which tries 50: the run goes on from its last file every time, and ends as if nothing had happened."""

import pytest
from chaos import chaos

from lit_rlhf.quickstart import evaluate
from lit_rlhf.quickstart.run import quickstart

ROWS = {"sft_train": 256, "comparisons_train": 64, "prompts_train": 64}
FEW = ROWS | {"sft_valid": 8, "comparisons_valid": 8, "prompts_valid": 8, "held_out": 8}
SHORT = {"ppo": ["--trainer.max_epochs=1", "--model.init_args.batch_size=8", "--model.init_args.sampling.max_new_tokens=8"]}


@pytest.mark.slow
def test_killed_four_times(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "FRESH_PAIRS", 20)
    assert quickstart(tmp_path, 0, FEW, SHORT) == 0
    found = chaos(tmp_path, 4, 12)
    print(f"\n{found}")
    assert found["kills"] == 4 and found["in_save"] >= 2  # two are aimed at a save, and others may meet one
    assert found["resumed_where_the_last_file_stood"] == 4 and found["weights_equal"]
