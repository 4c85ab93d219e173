"""Known vulnerabilities in the pinned packages, by pip-audit, which asks an advisory service on the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.trust.limits import Fault
from tools.host import ROOT

_TOOL = "pip-audit==2.10.1"

# Advisory: why it does not concern this project.
EXPLAINED: dict[str, str] = {}


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Audit constraints.txt. Return counts. Raises Fault for a vulnerability that is not explained."""
    report = folder / "audit.json"
    command = [sys.executable, "-m", "uv", "tool", "run", _TOOL, "--requirement", "constraints.txt", "--no-deps"]
    command += ["--disable-pip", "--progress-spinner", "off", "--format", "json", "--output", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not report.is_file():
        print(f"packages: nothing was audited: {done.stderr[-500:]}")
        return {"packages": 0, "audited": 0}
    packages, audited, vulnerable = judged(json.loads(report.read_text()))
    if vulnerable:
        raise Fault(f"vulnerable, without an explanation: {', '.join(vulnerable)}")
    if audited < packages:
        print(f"packages: {packages - audited} were not audited: the service does not know them, or cannot be reached")
    return {"packages": packages, "audited": audited}


def judged(report: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Return the number of packages in a report, of those that were audited, and vulnerabilities without an explanation."""
    packages = report["dependencies"]
    vulnerable = [
        f"{package['name']} {package['version']} ({advisory['id']})"
        for package in packages
        for advisory in package.get("vulns", ())
        if advisory["id"] not in EXPLAINED
    ]
    return len(packages), sum("skip_reason" not in package for package in packages), vulnerable
