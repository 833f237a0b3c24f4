import json
from types import SimpleNamespace

import pytest

from lit_rlhf.callbacks import ExportHF


def number(directory):
    return json.loads((directory / "config.json").read_text())["number"]


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_without_a_monitor_the_last_weights_are_written_once(fit, scripted, tmp_path):
    fit(scripted([1.0, 2.0, 3.0]), ExportHF(str(tmp_path / "out/hf")))
    assert number(tmp_path / "out/hf") == 3  # after three validations
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize(("mode", "kept"), [("max", 2), ("min", 3)])
def test_the_best_validation_is_kept(fit, scripted, tmp_path, mode, kept):
    # val/score 1, 5, 0.5: the most is seen at the second validation, the least at the third. The module counts a validation
    # before callbacks run, so the exported number is the validation's, counted from 1.
    fit(scripted([1.0, 5.0, 0.5]), ExportHF(str(tmp_path / "hf"), monitor="val/score", mode=mode))
    assert number(tmp_path / "hf") == kept


def test_nan_is_never_the_best(fit, scripted, tmp_path):
    fit(scripted([1.0, float("nan"), float("inf")]), ExportHF(str(tmp_path / "hf"), monitor="val/score"))
    assert number(tmp_path / "hf") == 1


def test_networks_go_to_their_subdirectories_and_replace_an_older_export(fit, scripted, tmp_path):
    fit(scripted([0.0], names=("policy", "value", "stale")), ExportHF(str(tmp_path / "hf")), epochs=1)
    fit(scripted([0.0, 0.0], names=("policy", "value")), ExportHF(str(tmp_path / "hf")), epochs=2)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["policy", "value"]
    assert number(tmp_path / "hf/policy") == number(tmp_path / "hf/value") == 2


def test_the_best_survives_a_resume(fit, scripted, tmp_path):
    callback = ExportHF(str(tmp_path / "hf"), monitor="val/score")
    trainer = fit(scripted([5.0]), callback, epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ExportHF(str(tmp_path / "hf"), monitor="val/score")
    fit(scripted([4.0, 4.0, 6.0]), again, epochs=3, ckpt_path=tmp_path / "a.ckpt")
    # epochs 2 and 3 log 4 and 4: less than 5, so the first export stays
    assert number(tmp_path / "hf") == 1 and again.best == 5.0


def test_a_monitor_that_is_not_logged_names_what_is(fit, scripted, tmp_path):
    with pytest.raises(ValueError, match=r"'val/rouge' was not logged \(logged: val/score\); name one"):
        fit(scripted([1.0]), ExportHF(str(tmp_path / "hf"), monitor="val/rouge"))


def test_without_any_validation_the_last_weights_are_written_with_a_warning(fit, scripted, tmp_path):
    with pytest.warns(UserWarning, match="no finite val/score was seen"):
        fit(scripted([]), ExportHF(str(tmp_path / "hf"), monitor="val/score"), limit_val_batches=0)
    assert number(tmp_path / "hf") == 0


def test_fast_dev_run_writes_nothing(fit, scripted, tmp_path):
    fit(scripted([1.0]), ExportHF(str(tmp_path / "hf")), fast_dev_run=True)
    assert not (tmp_path / "hf").exists()


def test_the_old_export_stays_when_the_new_one_fails(fit, scripted, tmp_path):
    fit(scripted([1.0]), ExportHF(str(tmp_path / "hf")), epochs=1)
    module = scripted([1.0, 1.0])
    module.fail = True
    with pytest.raises(RuntimeError, match="could not write .*No space left on device"):
        fit(module, ExportHF(str(tmp_path / "hf")), epochs=2)
    assert number(tmp_path / "hf") == 1
    assert leftovers(tmp_path) == []


def test_an_interrupted_exchange_is_undone(tmp_path):
    (tmp_path / ".hf.old").mkdir()
    (tmp_path / ".hf.old/config.json").write_text('{"number": 7}')
    trainer = SimpleNamespace(fast_dev_run=False, is_global_zero=True)
    ExportHF(str(tmp_path / "hf")).setup(trainer, None, "fit")
    assert number(tmp_path / "hf") == 7 and leftovers(tmp_path) == []


def test_a_directory_with_something_else_in_it_is_refused(fit, scripted, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is no export"):
        fit(scripted([1.0]), ExportHF(str(tmp_path / "thesis")))
    assert (tmp_path / "thesis/chapter1.tex").exists()


def test_the_model_that_a_run_starts_from_is_not_replaced(fit, scripted, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    module = scripted([1.0])
    module.model = str(tmp_path / "base")
    with pytest.raises(ValueError, match="is the model that this run starts from"):
        fit(module, ExportHF(str(tmp_path / "x/../base")))


def test_mode_is_checked():
    with pytest.raises(ValueError, match="max or min"):
        ExportHF("x", mode="most")
