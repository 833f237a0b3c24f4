"""From the turns' figures to the table: on the terminal, in benchmarks.json, in the README.

python tests/benchmarks/report.py .bench/benchmarks.json      copies the record and its chart here and writes the README's section from it
"""

import datetime
import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cases import CASES

from lit_rlhf.report import Plot, Series
from lit_rlhf.report.style import STYLE
from lit_rlhf.report.svg import svg

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: written by tests/benchmarks/report.py -->", "<!-- end of benchmarks -->"
Turns = Mapping[str, Sequence[Mapping[str, Any]]]


def machine(threads: int, wrap: str) -> dict[str, Any]:
    """What was measured on, and how."""
    cpu, memory = platform.processor() or platform.machine(), None
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = f"{known.get('model name', cpu)} (family {known.get('cpu family')}, model {known.get('model')})"
        flags = known.get("flags", "").split()
        cpu += "".join(f", {name}" for name in ("avx2", "avx512f", "amx_bf16") if name in flags)
        memory = round(int(Path("/proc/meminfo").read_text().split()[1]) / 2**20, 1)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"cpu": cpu, "threads": threads, "memory_gib": memory, "system": platform.platform(), "date": date, "wrap": wrap}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def summary(cases: Sequence[str], turns: Turns) -> dict[str, Any]:
    """Ratios turn by turn, and ours in detail; medians over the turns."""
    middle = lambda run, key: median(turn[key] for turn in turns[run])  # noqa: E731
    ratios = []
    for ratio in (r for name in cases for r in CASES[name].ratios if r.ours in turns and r.base in turns):
        ours, base = turns[ratio.ours], turns[ratio.base]
        ratios.append(
            {
                "what": ratio.what,
                "unit": ratio.unit,
                "ours": middle(ratio.ours, "units_per_second"),
                "base": middle(ratio.base, "units_per_second"),
                "ratio": spread([a["units_per_second"] / b["units_per_second"] for a, b in zip(ours, base, strict=True)]),
                "target": ratio.target,
                "peak_ours_mib": middle(ratio.ours, "peak_mib"),
                "peak_base_mib": middle(ratio.base, "peak_mib"),
                "peak_target": ratio.peak_target,
                "base_gc_seconds": median(turn["phases"].get("gc", 0.0) for turn in base),
            }
        )
    details = {run: detail(found) for run, found in turns.items() if found[0]["side"] == "ours"}
    return {"ratios": ratios, "ours": details, "growth": growth(turns)}


def detail(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One of our runs: its phases, padding and share of the peak."""
    phases = {name: median(turn["phases"].get(name, 0.0) for turn in found) for name in found[0]["phases"]}
    out = {"seconds": median(t["seconds_per_step"] for t in found), "phases": phases, "padding": median(t["padding"] for t in found)}
    if "share_of_peak" in found[0]:
        names = ("with_recomputation", "without_recomputation")
        out["share_of_peak"] = {name: median(t["share_of_peak"][name] for t in found) for name in names}
        out["peak_gflops"] = {name: median(t["peak_gflops"][name] for t in found) for name in ("float32", "bfloat16")}
        out["update_seconds"] = median(t["update_seconds"] for t in found)
    return out


def growth(turns: Turns) -> dict[str, list[tuple[int, float, float]]]:
    """Ours, PPO: (prompt tokens, seconds a response, peak MiB) and (responses per prompt, …)."""

    def of(prefix: str, keys: Sequence[int], first: str = "") -> list[tuple[int, float, float]]:
        named = [(key, f"{prefix}{key}" if key != 1 else first) for key in keys]
        return [
            (key, median(t["seconds_per_step"] / t["units"] for t in turns[name]), median(t["peak_mib"] for t in turns[name]))
            for key, name in named
            if name in turns
        ]

    return {
        "prompt_tokens": of("growth_", (128, 256, 512)),
        "responses_per_prompt": of("growth_256x", (1, 2, 4, 8), "growth_256"),
    }


def write_chart(record: Mapping[str, Any], path: Path) -> None:
    """Both lines of the cost of growing, side by side in one SVG file."""
    found, y = record["summary"]["growth"], "seconds a response"
    panels = (
        ("prompt_tokens", "32 prompts, 1 response each", "prompt tokens"),
        ("responses_per_prompt", "32 responses, prompts of 256", "responses per prompt"),
    )
    columns = {key: list(zip(*found[key], strict=True)) for key, _, _ in panels}
    charts = [Plot(title, x, y, [Series("ours", *columns[key][:2])], y_range=(0, 0)) for key, title, x in panels]
    parts = [svg(chart).replace("<svg ", f'<svg x="{360 * i}" y="0" width="360" height="220" ', 1) for i, chart in enumerate(charts)]
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="220" viewBox="0 0 720 220">'
    path.write_text(f'{frame}<style>{STYLE}</style><rect width="720" height="220" fill="var(--page)"/>{"".join(parts)}</svg>\n')


def ratio_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The table of ratios as text, header first."""
    rows = [["what", "ours", "theirs", "ratio: median (min to max)", "target", "peak memory, ours / theirs"]]
    for row in record["summary"]["ratios"]:
        ratio, share = row["ratio"], row["peak_ours_mib"] / row["peak_base_mib"]
        limit = f" (target {row['peak_target']:g})" if row["peak_target"] else ""
        rows.append(
            [
                row["what"],
                f"{row['ours']:.2f} {row['unit']}",
                f"{row['base']:.2f} {row['unit']}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                f"{row['target']:g}",
                f"{row['peak_ours_mib'] / 1024:.1f} / {row['peak_base_mib'] / 1024:.1f} GiB = {share:.2f}{limit}",
            ]
        )
    return rows


def detail_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Our phases, padding and share of the peak as text, header first."""
    rows = [["ours", "seconds a step or iteration", "of which", "padding of training rows", "share of the matrix-product peak"]]
    for name, found in record["summary"]["ours"].items():
        phases = {k: v for k, v in found["phases"].items() if k not in ("gc", "collect") and v}
        phases |= {"update": found["update_seconds"]} if "update_seconds" in found else {}
        share = found.get("share_of_peak")
        reached = f"{share['without_recomputation']:.2f} ({share['with_recomputation']:.2f})" if share else "–"
        split = ", ".join(f"{k} {v:.2f}" for k, v in phases.items()) or "–"
        rows.append([name.removesuffix("_ours"), f"{found['seconds']:.2f}", split, f"{found['padding']:.3f}", reached])
    return rows


def growth_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The cost of growing as text, header first."""
    found, rows = record["summary"]["growth"], [["ours, PPO", "seconds a response", "peak memory"]]
    for key, form in (
        ("prompt_tokens", "32 prompts of {} tokens, 1 response each"),
        ("responses_per_prompt", "prompts of 256 tokens, {} of 32 responses each"),
    ):
        rows += [[form.format(at), f"{seconds:.2f}", f"{peak / 1024:.1f} GiB"] for at, seconds, peak in found[key]]
    return rows


def terminal_table(record: Mapping[str, Any]) -> str:
    """All tables in columns."""
    blocks = []
    for rows in (ratio_rows(record), detail_rows(record), growth_rows(record)):
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        blocks += ["\n".join(lines)] if len(rows) > 1 else []
    return "\n\n".join(["", *blocks])


def markdown_table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(record: Mapping[str, Any]) -> str:
    """The README's section, from the record alone."""
    on, model = record["machine"], record["model"]
    runs = record["turns"]
    trl = {run[0]["versions"]["trl"] for run in runs.values() if "trl" in run[0]["versions"]}
    one = next(iter(runs.values()))[0]["versions"]
    gc = max((row["base_gc_seconds"] for row in record["summary"]["ratios"]), default=0.0)
    turns = min(len(found) for found in runs.values())
    intro = (
        f"{on['cpu']}, {on['threads']} threads, {on['memory_gib']} GiB; torch {one['torch']}, transformers {one['transformers']}; "
        f"{on['date']}. TRL {' and '.join(sorted(trl, reverse=True))} (1.12.0 is the last with PPO). A Llama of "
        f"{model['parameters'] / 1e6:.1f}M weights (random, float32; vocabulary {model['vocabulary']:,}); the same weights, rows, batches, "
        f"AdamW, dtype and threads on both sides, each process alone on the machine, in turns; {turns} turns. TRL without "
        f"gradient checkpointing; its `gc.collect` took at most {gc:.2f} s of a step."
    )
    parts = [intro, markdown_table(ratio_rows(record)), markdown_table(detail_rows(record)), markdown_table(growth_rows(record))]
    return "\n\n".join([BEGIN, *parts, END])


def main() -> None:
    source = Path(sys.argv[1])
    record = json.loads(source.read_text())
    (HERE / "benchmarks.json").write_text(json.dumps(record, indent=1) + "\n")
    if (chart := source.parent / "growth.svg").is_file():
        shutil.copy(chart, HERE / "growth.svg")
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + section(record) + rest.split(END)[1])


if __name__ == "__main__":
    main()
