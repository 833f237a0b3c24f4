"""What is measured: the processes of one turn, and the ratios that are taken from them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """One process: a side's command line."""

    name: str
    side: str
    stage: str
    steps: int
    rows: str = ""
    precision: str = "float32"
    batch: int = 16
    responses: int = 1

    def arguments(self, steps: int | None = None) -> list[str]:
        found = [self.stage, "--precision", self.precision, "--batch", str(self.batch), "--responses", str(self.responses)]
        return [*found, "--steps", str(self.steps if steps is None else steps)] + (["--rows", self.rows] if self.rows else [])


@dataclass(frozen=True)
class Ratio:
    """A row of the table: units per second of `ours` over those of `base`, turn by turn; `target` is the issue's."""

    what: str
    ours: str
    base: str
    unit: str
    target: float
    peak_target: float | None = None
    """At most this share of the base's peak memory."""


@dataclass(frozen=True)
class Case:
    """The processes of a turn, in their order, and what is read from them."""

    runs: list[Run]
    ratios: list[Ratio] = field(default_factory=list)
    turns: int | None = None
    """At most so many turns."""


def pair(name: str, stage: str, steps: int, **more) -> list[Run]:  # type: ignore[no-untyped-def]
    """The same work on both sides."""
    return [Run(f"{name}_ours", "ours", stage, steps, **more), Run(f"{name}_trl", "trl", stage, steps, **more)]


PPO = {"batch": 32}
CASES = {
    "sft": Case(pair("sft", "sft", 6), [Ratio("SFT, Debian, 16 rows a step", "sft_ours", "sft_trl", "rows/s", 3.5)]),
    "reward": Case(pair("reward", "reward", 10), [Ratio("reward, Debian, 16 pairs a step", "reward_ours", "reward_trl", "pairs/s", 5.0)]),
    "hh": Case(pair("hh", "reward", 8, rows="hh"), [Ratio("reward, HH data, 16 pairs a step", "hh_ours", "hh_trl", "pairs/s", 4.0)]),
    "ppo": Case(
        [
            # Ours one after the other: two precisions are compared within a minute.
            Run("ppo_ours", "ours", "ppo", 1, **PPO),
            Run("ppo_bf16_ours", "ours", "ppo", 1, precision="bf16", **PPO),
            Run("ppo_8x4_ours", "ours", "ppo", 1, rows="prompts8", responses=4, **PPO),
            Run("ppo_trl", "trl", "ppo", 1, **PPO),
            Run("ppo_bf16_trl", "trl", "ppo", 1, precision="bf16", **PPO),
        ],
        [
            Ratio("PPO, 32 prompts x 1, float32", "ppo_ours", "ppo_trl", "responses/s", 3.0, 0.5),
            Ratio("PPO, 32 prompts x 1, bf16", "ppo_bf16_ours", "ppo_bf16_trl", "responses/s", 3.0, 0.5),
            Ratio("PPO, ours bf16-mixed over ours float32", "ppo_bf16_ours", "ppo_ours", "responses/s", 2.0),
            Ratio("PPO, ours 8 prompts x 4 over TRL's 32 x 1, float32", "ppo_8x4_ours", "ppo_trl", "responses/s", 6.0, 0.5),
        ],
    ),
    "growth": Case(
        [Run(f"growth_{n}", "ours", "ppo", 1, rows=f"long{n}", **PPO) for n in (128, 256, 512)]
        + [Run(f"growth_256x{k}", "ours", "ppo", 1, rows="long256", responses=k, **PPO) for k in (2, 4, 8)],
        turns=1,
    ),
    "dpo": Case(pair("dpo", "dpo", 4), [Ratio("DPO, Debian, 16 pairs a step", "dpo_ours", "dpo_trl", "pairs/s", 8.0)]),
    "rloo": Case(
        pair("rloo", "rloo", 1, batch=32, responses=4),
        [Ratio("RLOO, 8 prompts x 4, float32", "rloo_ours", "rloo_trl", "responses/s", 4.0)],
    ),
    # Asked for by name (CASES="sft32 …").
    "sft32": Case(pair("sft32", "sft", 3, batch=32), [Ratio("SFT, Debian, 32 rows a step", "sft32_ours", "sft32_trl", "rows/s", 3.5)]),
    "reward32": Case(
        pair("reward32", "reward", 3, batch=32),
        [Ratio("reward, Debian, 32 pairs a step", "reward32_ours", "reward32_trl", "pairs/s", 5.0)],
    ),
}
DEFAULT = ("sft", "reward", "hh", "ppo", "dpo", "rloo", "growth")
