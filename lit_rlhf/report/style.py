"""Style sheets of the page and of a figure by itself: each for light, dark and paper."""

LIGHT = {"text": "#1b1f24", "soft": "#5b6470", "rule": "#d9dee5", "page": "#ffffff", "card": "#f5f7fa", "good": "#1f7a3d", "bad": "#b3261e"}
DARK = {"text": "#e6e9ee", "soft": "#9aa4b2", "rule": "#343b46", "page": "#14171c", "card": "#1d2128", "good": "#6cc98b", "bad": "#ff8a80"}
# Told apart by people who do not see all colours too (after Okabe and Ito 2008).
LIGHT_COLOURS = ("#1f6feb", "#c2570c", "#2c8a4b", "#a13d8f", "#8a6d00", "#0f8a94")
DARK_COLOURS = ("#6ea8fe", "#f0a35e", "#6cc98b", "#e291d2", "#d9bc4a", "#5fd0d8")


def _variables(names: dict[str, str], colours: tuple[str, ...]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in {**names, **{f"c{i}": c for i, c in enumerate(colours)}}.items())


def _series() -> str:
    """The classes of the series, one for each colour."""
    rules = []
    for i in range(len(LIGHT_COLOURS)):
        colour = f"var(--c{i})"
        rules.append(f".line{i}, .dashed{i} {{ stroke: {colour}; stroke-width: 1.8; }} .dashed{i} {{ stroke-dasharray: 5 4; }}")
        rules.append(f".dot{i} {{ fill: {colour}; fill-opacity: .75; }} .band{i} {{ fill: {colour}; fill-opacity: .18; }}")
        rules.append(f".column{i} {{ fill: {colour}; fill-opacity: .5; }} .whisker{i} {{ stroke: {colour}; stroke-width: 1.5; }}")
    return "\n".join(rules) + "\n.column0 + .whisker0 { stroke: var(--text); }"


PALETTE = f""":root {{ color-scheme: light dark; {_variables(LIGHT, LIGHT_COLOURS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, DARK_COLOURS)} }} }}
"""
MARKS = """svg text { font-family: inherit; fill: var(--text); } svg .title { font-size: 12px; font-weight: 600; }
svg .tick { font-size: 10px; fill: var(--soft); } svg .label { font-size: 10.5px; fill: var(--soft); }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg polyline { fill: none; stroke-linejoin: round; } svg .grid { stroke: var(--rule); }
svg .level { stroke: var(--soft); stroke-dasharray: 2 3; }
"""
BODY = """body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1180px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; } p { max-width: 75ch; } .soft, figcaption { color: var(--soft); }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; vertical-align: bottom; }
th.words, td.words { text-align: left; } td.long { white-space: pre-wrap; min-width: 22ch; max-width: 60ch; overflow-wrap: anywhere; }
.pass { color: var(--good); font-weight: 600; } .fail { color: var(--bad); font-weight: 600; } .warn { font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem; margin: .8rem 0;
  align-items: start; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 8px; } figure svg { width: 100%; display: block; }
figcaption { font-size: .82rem; line-height: 1.4; padding: .2rem .3rem 0; }
article { background: var(--card); border-radius: 8px; padding: .8rem 1rem; margin: .8rem 0; break-inside: avoid; }
article p { margin: .2rem 0 .6rem; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere; }
article dl { display: grid; grid-template-columns: minmax(4rem, max-content) minmax(3.4rem, max-content) 1fr; gap: .15rem .6rem;
  margin: 0; }
article dt { color: var(--soft); } article dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
article dd.number { text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 700px) { body { margin: 1rem auto; } .figures { grid-template-columns: 1fr; } }
"""
STYLE = PALETTE + BODY + MARKS + _series()
FIGURE_STYLE = PALETTE + "svg { background: var(--card); font-family: system-ui, sans-serif; }\n" + MARKS + _series()
