"""Opens a page in headless Chromium, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH: the page is not tried in a browser (apt-get install chromium)"
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars")


def open_page(path: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """What Chromium prints (the DOM with --dump-dom), and the lines that the page wrote to its console."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--enable-logging=stderr", *flags, path.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout, re.findall(r".*CONSOLE.*", run.stderr)
