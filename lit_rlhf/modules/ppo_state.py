"""What a checkpoint of a module with iterations holds beside weights and Lightning's counters, so that a run goes on as if never stopped.

Counters, KL coefficient, running score moments; in mid-iteration also the experience (of all ranks: every rank holds it whole), the
numbers logged in the iteration so far, and whether its updates were stopped.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_rlhf.batch import Batch, Experience
from lit_rlhf.checkpoints import fingerprint, load, save
from lit_rlhf.data.loader import run_seed

COUNTERS = ("iteration", "episodes", "kl_coef", "stopped")


class Journal:
    """The numbers of one iteration: those of its rollout, then those of each update.

    Callbacks may monitor their means as any metric's. The loggers get them at the iteration's last update and not from Lightning's end of
    an epoch, which some resumes skip.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []
        self.resumed = False

    def add(self, module: L.LightningModule, stats: Mapping[str, Tensor]) -> None:
        """Writes one rollout's or update's numbers down."""
        self.entries.append({name: float(value) for name, value in stats.items()})
        self._log(module, self.entries[-1])

    def replay(self, module: L.LightningModule) -> None:
        """After a resume in mid-iteration: logs the earlier numbers again, so that the epoch's means are those of the whole iteration."""
        for entry in self.entries if self.resumed else ():
            self._log(module, entry)
        self.resumed = False

    def write(self, trainer: L.Trainer) -> None:
        """Gives the loggers the means of everything written down."""
        names = dict.fromkeys(name for entry in self.entries for name in entry)
        means = {name: fmean(entry[name] for entry in self.entries if name in entry) for name in names}
        for logger in trainer.loggers:
            logger.log_metrics(means | {"epoch": trainer.current_epoch}, step=trainer.global_step)

    def _log(self, module: L.LightningModule, entry: dict[str, float]) -> None:
        module.log_dict(entry, on_step=False, on_epoch=True, batch_size=1, logger=False)


def save_state(ppo: Any, checkpoint: dict[str, Any]) -> None:
    """Adds the state of PPO, or of a module with its counters, to a checkpoint."""
    save(ppo, checkpoint)
    state = {name: getattr(ppo, name) for name in COUNTERS if hasattr(ppo, name)}
    position = ppo.step_position if ppo.run.unfinished(ppo.trainer) else ppo.position
    updates = position // ppo.trainer.accumulate_grad_batches
    state |= {"updates": updates}
    if hasattr(ppo, "collapse"):
        state["collapse"] = ppo.collapse.state()
    if ppo.experience is not None and updates < ppo.steps_per_iteration:
        state |= {"experience": ppo.experience.state(), "journal": ppo.journal.entries[: updates + 1], "fixed": fixed(ppo)}
    if getattr(ppo, "moments", None) is not None:
        state["moments"] = [ppo.moments.count, ppo.moments.mean, ppo.moments.squares]
    checkpoint["ppo"] = state


def load_state(ppo: Any, checkpoint: dict[str, Any]) -> None:
    """Takes PPO's state from a checkpoint; ValueError where settings that a half-done iteration depends on were changed."""
    load(ppo, checkpoint)
    state = checkpoint["ppo"]
    if "fixed" in state and ppo._trainer is not None and ppo.trainer.training:
        check_fixed(ppo, state)
    for name in set(COUNTERS) & state.keys():
        setattr(ppo, name, state[name])
    ended = state["updates"] and "experience" not in state  # however many updates an iteration has now
    accumulate = 1 if ppo._trainer is None else ppo.trainer.accumulate_grad_batches
    ppo.position = ppo.step_position = (ppo.steps_per_iteration if ended else state["updates"]) * accumulate
    if "collapse" in state:
        ppo.collapse.load(state["collapse"])
    saved = state.get("experience")
    ppo.experience = None if saved is None else Experience.of_state(saved) if "batch" in saved else Batch(**saved)
    ppo.journal.entries, ppo.journal.resumed = list(state.get("journal", [])), True
    if getattr(ppo, "moments", None) is not None and "moments" in state:
        ppo.moments.count, ppo.moments.mean, ppo.moments.squares = state["moments"]


def begin_anew(ppo: Any) -> None:
    """A fit that does not go on from a checkpoint starts with a rollout, whatever an earlier fit or loading left half done."""
    if ppo.run.resumed is None and (ppo.position or ppo.experience is not None):
        ppo.iteration, ppo.position, ppo.experience, ppo.stopped = ppo.iteration + 1, 0, None, False


def fixed(ppo: Any) -> dict[str, Any]:
    """The settings that may not change within an iteration: they say which responses the remaining updates learn from."""
    names = ("batch_size", "responses_per_prompt", "ppo_epochs", "epochs", "minibatches")
    own = {name: getattr(ppo, name) for name in names if hasattr(ppo, name)}
    return own | {"seed": run_seed(), "temperature": ppo.sampling.temperature}


def check_fixed(ppo: Any, state: dict[str, Any]) -> None:
    """Raises ValueError naming what changed."""
    now = fixed(ppo)
    changed = [f"{name} was {old} and is {now[name]}" for name, old in state["fixed"].items() if now[name] != old]
    if changed:
        epochs = state["fixed"].get("ppo_epochs") or state["fixed"]["epochs"]
        raise ValueError(
            f"the checkpoint is from the middle of iteration {state['iteration']} (after update {state['updates']} "
            f"of {epochs * state['fixed']['minibatches']}), and {', '.join(changed)}: "
            "resume with what it was, or from a checkpoint at the end of an iteration"
        )


def source_fingerprints(ppo: Any) -> dict[str, str]:
    """Of every directory or hub model that the run starts from."""
    found = {"model": fingerprint(ppo.model, ppo.source["revision"])}
    if ppo.reward_model is not None:
        found["reward_model"] = fingerprint(ppo.reward_model)
    if getattr(ppo, "value_init", "sft") not in ("reward", "sft"):
        found["value_init"] = fingerprint(ppo.value_init)
    return found


def where(ppo: Any) -> str:
    """Where a run stands, and what its last rollout was like, for error messages."""
    seen = {name.removeprefix("rollout/"): value for entry in ppo.journal.entries[:1] for name, value in entry.items()}
    known = ", ".join(f"{name} {seen[name]:.4g}" for name in ("score", "score_std", "kl", "length") if name in seen)
    return f", iteration {ppo.iteration}, update {ppo.position // ppo.trainer.accumulate_grad_batches}, rollout: {known}"


def warn_stopped(ppo: Any, kl: float) -> None:
    """Says that the KL guard skips the rest of an iteration."""
    update = ppo.position // ppo.trainer.accumulate_grad_batches
    rank_zero_warn(
        f"iteration {ppo.iteration}: before update {update} of {ppo.steps_per_iteration} the policy is {kl:.3g} nats per token from the "
        f"one that sampled, over max_kl_per_iteration {ppo.max_kl_per_iteration}: the rest of the iteration's updates are skipped"
    )
