"""Imports point down: a file may import from its own layer and from those below it, and no two files import each other."""

import ast
from pathlib import Path

import pytest

import lit_rlhf

PACKAGE = Path(lit_rlhf.__file__).parent
LAYERS = (
    {"functional", "attention"},
    {"batch", "layout", "networks", "directories", "pretrained", "metrics", "optim", "sharding", "strategies", "checkpoint_io", "collapse"}
    | {"report", "perf", "q_values", "quantile_tokens"},
    {"decoding", "generation", "scoring", "scorers", "rewards", "masked_policy", "data"},
    {"rollout", "best_of", "checkpoints"},
    {"modules", "callbacks", "quickstart", "inspector"},
    {"__init__", "api", "cli", "cli_errors", "consolidate"},
    {"quickstart.run", "planning", "doctor", "frontier", "winrate", "inspector.run", "learning_curve"}  # drive the command line
    | {"iterate", "ai_feedback"},
    {"__main__"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FUNCTIONAL_MAY_USE = {"torch", "math", "collections", "typing", "itertools", "functools", "dataclasses", "lit_rlhf"}


def module_name(path: Path) -> str:
    parts = ("lit_rlhf", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(name: str) -> int:
    part = name.split(".")[1] if "." in name else "__init__"
    part = next((whole for whole in LAYER if name == f"lit_rlhf.{whole}"), part)
    assert part in LAYER, f"lit_rlhf/{part} has no layer yet: give it one in tests/test_imports.py"
    return LAYER[part]


def imports(name: str, nested: bool) -> set[str]:
    """The modules that a file imports; with `nested` also those imported inside of functions."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}; write lit_rlhf.… in full"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & set(FILES) or {node.module}
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    for target in imports(name, nested=True) & set(FILES):
        assert layer(target) <= layer(name), f"{name} (layer {layer(name)}) imports {target} (layer {layer(target)})"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("lit_rlhf.functional")])
def test_functional_needs_torch_only(name):
    assert {target.split(".")[0] for target in imports(name, nested=True)} <= FUNCTIONAL_MAY_USE


def test_callbacks_and_modules_do_not_know_each_other():
    for name in FILES:
        for one, other in (("callbacks", "modules"), ("modules", "callbacks"), ("modules", "quickstart"), ("callbacks", "quickstart")):
            if name.startswith(f"lit_rlhf.{one}"):
                assert not {t for t in imports(name, nested=True) if t.startswith(f"lit_rlhf.{other}")}, f"{name} imports lit_rlhf.{other}"


def test_no_cycles():
    graph = {name: imports(name, nested=False) & set(FILES) - {name} for name in FILES}

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "cycle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in graph[name]:
                walk(target, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in graph:
        walk(name, ())


def test_what_was_checked():
    assert len(FILES) > 25 and {"lit_rlhf.functional.losses", "lit_rlhf.modules.ppo", "lit_rlhf.cli"} <= set(FILES)
