"""The frontier as report.html and report.json, and as lines for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from lit_rlhf.frontier.analysis import REWARDS, Mark, Parting
from lit_rlhf.functional.best_of_n import Law
from lit_rlhf.report import Plot, Report, Series, Table

CURVE = 60  # points of a fitted curve
LAW_TEXT = {"best_of_n": "d (a - b d)", "rl": "d (a - b ln d)"}
NAMES = {"best_of_n": "best-of-n", "rl": "PPO"}


def report(
    title: str,
    runs: Mapping[str, Sequence[Mark]],
    best_of: Sequence[Mark],
    fits: Mapping[str, Mapping[str, Law]],
    partings: Sequence[Parting],
) -> Report:
    """Plots of gain against sqrt(KL), the laws, each run's points, and what gold would pick."""
    marks = [m for run in runs.values() for m in run]
    page = Report(title, lead="Gains over the SFT policy on held-out prompts, in standard deviations of its own samples' rewards.")
    page.data = {
        "marks": [asdict(m) for m in [*marks, *best_of]],
        "laws": {form: {reward: law._asdict() for reward, law in found.items()} for form, found in fits.items()},
        "partings": [asdict(p) for p in partings],
    }
    figures = [picture("PPO", marks, fits.get("rl", {})), picture("Best-of-n from SFT", best_of, fits.get("best_of_n", {}))]
    page.add("Over-optimisation", *figures, *([both(marks, best_of)] if any("gold" in m.gains for m in marks) else []), _laws(fits))
    if partings:
        page.add("Where proxy and gold part", _partings(partings))
    page.add("All points", _points([*marks, *best_of]))
    return page


def picture(title: str, marks: Sequence[Mark], fits: Mapping[str, Law]) -> Plot:
    """Points with whiskers and the fitted laws."""
    series = []
    for reward in REWARDS:
        known = sorted((m for m in marks if reward in m.gains), key=lambda m: m.distance)
        if not known:
            continue
        gains = [m.gains[reward] for m in known]
        hints = [f"{m.setting}, {m.iteration}: {reward} {m.gains[reward].mean:.2f} at {m.kl:.2f} nats" for m in known]
        low, high = [g.low for g in gains], [g.high for g in gains]
        series.append(Series(reward, [m.distance for m in known], [g.mean for g in gains], low, high, "points", hints))
        if reward in fits:
            far = max(m.distance for m in known)
            xs = [far * i / CURVE for i in range(CURVE + 1)]
            series.append(Series(f"{reward}'s fit", xs, [fits[reward](x) for x in xs], kind="dashed", like=reward))
    return Plot(title, "sqrt(KL) (nats^½)", "gain (SD of SFT samples)", series)


def both(marks: Sequence[Mark], best_of: Sequence[Mark], title: str = "Gold reward of both") -> Plot:
    """The gold reward of both."""
    series = []
    for name, part in (("PPO", marks), ("best-of-n", best_of)):
        known = sorted((m for m in part if "gold" in m.gains), key=lambda m: m.distance)
        golds = [m.gains["gold"] for m in known]
        kind = "points" if name == "PPO" else "line"
        series.append(
            Series(name, [m.distance for m in known], [g.mean for g in golds], [g.low for g in golds], [g.high for g in golds], kind)
        )
    return Plot(title, "sqrt(KL) (nats^½)", "gold gain (SD of SFT samples)", series)


def _laws(fits: Mapping[str, Mapping[str, Law]]) -> Table:
    rows = [
        [NAMES[form], reward, LAW_TEXT[form], law.a, law.b, law.error, law.peak_distance**2, law.peak]
        for form, found in fits.items()
        for reward, law in found.items()
    ]
    head = ["of", "reward", "law, d = sqrt(KL)", "a", "b", "RMS error", "KL at its peak (nats)", "gain there"]
    return Table("Gao et al. 2022's laws, by least squares", head, rows, digits=2)


def _partings(partings: Sequence[Parting]) -> Table:
    rows = [[p.setting, p.best, p.best_kl, p.best_gold, p.parted, p.parted_kl, p.lost, p.proxy_gain] for p in partings]
    head = [
        "setting",
        "gold picks iteration",
        "KL (nats)",
        "gold gain",
        "parted at iteration",
        "KL there",
        "gold lost by the end",
        "proxy gained",
    ]
    note = (
        "Parted: the first iteration after gold's best whose gold is lower beyond the noise (95%) while its proxy is not; empty: none is."
    )
    return Table("", head, rows, digits=2, note=note)


def _points(marks: Sequence[Mark]) -> Table:
    rows = [[m.setting, m.iteration, m.kl, *(m.gains.get(reward) for reward in REWARDS), m.length] for m in marks]
    return Table("", ["setting", "iteration or n", "KL (nats)", *REWARDS, "length (tokens)"], rows, digits=2)


def as_text(partings: Sequence[Parting], fits: Mapping[str, Mapping[str, Law]], runs: Mapping[str, Sequence[Mark]]) -> str:
    """A few lines for the terminal."""
    lines = []
    for setting, marks in runs.items():
        last = marks[-1]
        gains = ", ".join(f"{reward} {gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})" for reward, gain in last.gains.items())
        lines.append(f"{setting}: after {last.iteration} iterations {last.kl:.2f} nats, {gains}")
    for p in partings:
        parted = (
            "proxy and gold do not part" if p.parted is None else f"proxy and gold part at iteration {p.parted} ({p.parted_kl:.2f} nats)"
        )
        lines.append(f"{p.setting}: gold picks iteration {p.best} ({p.best_kl:.2f} nats, {p.best_gold.mean:+.2f}); {parted}")
    for form, found in fits.items():
        for reward, law in found.items():
            peak = f"peak {law.peak:.3g} at {law.peak_distance**2:.3g} nats" if law.b > 0 else "no peak"
            lines.append(f"{NAMES[form]}, {reward}: {LAW_TEXT[form]}, a {law.a:.3g}, b {law.b:.3g}, {peak}")
    return "\n".join(lines)
