"""Known vulnerabilities of what is locked, as pip-audit finds them in PyPI's database.

Exit code 1 if there are some that are not accepted below. A database that does not answer, as
where packages come from a mirror, is no failure, but said: so many of how many were checked.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

LOCKED = pathlib.Path(__file__).parent / "locked"
# Vulnerabilities that do not concern this project: identifier -> why not, and until when.
ACCEPTED: dict[str, str] = {}
# How pip-audit ends where the database cannot be asked; its exit code is 1 for everything.
UNREACHED = ("requests.exceptions.", "your network may be blocking", "ServiceError")


def audit(report: pathlib.Path) -> str:
    """Runs pip-audit, which writes what it found as JSON.

    Args:
      report: the file, which is not written where the database is not reached.

    Returns:
      The last line of its messages.
    """
    files = [f"--requirement={path}" for path in sorted(LOCKED.glob("*.txt"))]
    accepted = [f"--ignore-vuln={identifier}" for identifier in ACCEPTED]
    # The lock as it is: nothing is resolved or installed.
    options = ["--disable-pip", "--require-hashes", "--progress-spinner=off", "--desc=off"]
    options += ["--format=json", f"--output={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *options, *files, *accepted],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def verdict(found: Mapping[str, Any] | None, message: str) -> tuple[int, str]:
    """What to print, after the exit code.

    Args:
      found: pip-audit's report, None if there is none.
      message: pip-audit's last words.
    """
    if found is None:
        if any(sign in message for sign in UNREACHED):
            return 0, f"vulnerabilities: not checked, the database does not answer: {message}"
        return 1, f"error: vulnerabilities: pip-audit failed: {message}"
    parts = found["dependencies"]
    checked = [part for part in parts if "skip_reason" not in part]
    lines = [f"vulnerabilities: {len(checked)} of {len(parts)} locked distributions checked"]
    if len(checked) < len(parts):
        skipped = next(part for part in parts if "skip_reason" in part)
        lines.append(f"  the others not: {skipped['skip_reason']}, ...")
    for part in checked:
        for each in part["vulns"]:
            names = ", ".join([each["id"], *each.get("aliases", [])])
            mended = ", ".join(each["fix_versions"]) or "no release yet"
            lines.append(f"  {part['name']} {part['version']}: {names}; mended in {mended}")
    vulnerable = any(part["vulns"] for part in checked)
    if vulnerable:
        lines.append(
            "error: renew what is vulnerable: bash launch/lock.sh --upgrade-package NAME; or "
            "say in launch/audit.py why it does not concern this project"
        )
    lines += [f"  accepted: {name}: {reason}" for name, reason in ACCEPTED.items()]
    return int(vulnerable), "\n".join(lines)


def main() -> int:
    """Prints what is known; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        message = audit(report)
        found = json.loads(report.read_text()) if report.exists() else None
    code, text = verdict(found, message)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
