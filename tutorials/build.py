"""Makes the notebooks from their sources and runs them, so that each is committed with what it printed.

    python tutorials/build.py [01 02 ...]

A source is a Python file in which `# %%` begins a code cell and `# %% [markdown]` a text cell.
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("[0-9][0-9]_*.py"))


def notebook(source: Path) -> Any:
    """The notebook of a source, without outputs; every text before the first `# %%` is left out."""
    parts = re.split(r"^# %%(.*)\n", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    cells = []
    for i, (kind, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if "[markdown]" in kind:
            cell = new_markdown_cell("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
        else:
            cell = new_code_cell(body.strip())
        cell["id"] = f"cell-{i}"  # nbformat draws random ones, which would change with every build
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(made: Any, folder: Path, timeout: int | None = None) -> Any:
    """Runs the notebook in `folder` on one thread and offline; raises CellExecutionError where a cell fails."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(made, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False)
    return client.execute(env=os.environ | fixed)


def main(names: list[str]) -> None:
    """Builds the notebooks whose names begin with one of `names`, or all."""
    for source in SOURCES:
        if names and not source.name.startswith(tuple(names)):
            continue
        start = time.time()
        nbformat.write(execute(notebook(source), HERE), source.with_suffix(".ipynb"))
        print(f"{source.with_suffix('.ipynb').name}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
