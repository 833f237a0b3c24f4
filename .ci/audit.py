"""A note on known vulnerabilities of the pinned dependencies, by pip-audit; it never fails a build.

    python .ci/audit.py PIP_AUDIT CONSTRAINTS

Where pip-audit or its database cannot be reached, one line says so.
"""

import json
import subprocess
import sys


def note(command: list[str]) -> str:
    """What pip-audit found, in a line for each vulnerability, or why it found nothing out."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        found = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as error:
        return f"audit: pip-audit gave no answer ({type(error).__name__}), so nothing was checked"
    checked = [package for package in found if "skip_reason" not in package]
    if not checked:
        return f"audit: pip-audit could look up none of {len(found)} packages here (its database is not reachable), so nothing was checked"
    lines = [
        f"audit: {p['name']} {p['version']}: {v['id']}, mended in {', '.join(v.get('fix_versions') or ['no version yet'])}"
        for p in checked
        for v in p.get("vulns", [])
    ]
    return "\n".join(
        [*lines, f"audit: {len(lines)} known vulnerabilities in {len(checked)} of {len(found)} packages that could be looked up"]
    )


if __name__ == "__main__":
    print(note([sys.argv[1], "-r", sys.argv[2], "--no-deps", "--disable-pip", "--progress-spinner=off", "-f", "json"]))
