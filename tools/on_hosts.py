"""`make test-hosts`: the tests that run in a ComfyUI, in every release of the table, each with its own environment.

`python -m tools.on_hosts [ARGUMENT …]` hands arguments on to pytest in place of the tests that it chooses.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.errors import SetupError
from tools.host import RELEASES, ROOT, Host, released_host
from tools.setup import prepare

# Those that run in a host or with the packages that it pins.
TESTS = (
    "tests/comfyui",
    "tests/browser",
    "tests/unit/test_setup.py",
    "tests/unit/test_hosts_blocks.py",
    "tests/unit/test_hosts_diffusers.py",
    "tests/unit/test_hosts_files.py",
    "tests/unit/test_hosts_loras.py",
    "tests/unit/test_experts.py",
)
SUMMARY = re.compile(r"\d+ (passed|failed|error|skipped|deselected|no tests ran)")  # pytest's last line


def run(root: Path, host: Host, arguments: Sequence[str]) -> tuple[bool, str]:
    """Run pytest in this host's environment, printing as it goes: whether all passed, and its last line."""
    assert host.release is not None
    environ = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    environ["D2M_HOST"] = host.release.comfyui
    command = [str(host.python), "-m", "pytest", *arguments]
    last = "it did not run"
    with subprocess.Popen(command, cwd=root, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if SUMMARY.search(line):
                last = line.strip("= \n")
    return process.returncode == 0, last


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Set up and test every release; 1 if any of them fails."""
    found: dict[str, tuple[bool, str]] = {}
    for release in RELEASES:
        host = released_host(root, release)
        print(f"── ComfyUI {release.comfyui} ({host.venv.name})", flush=True)
        try:
            prepare(root, host)
            found[release.comfyui] = run(root, host, arguments or TESTS)
        except SetupError as error:
            print(f"error: {error}", file=sys.stderr)
            found[release.comfyui] = (False, "it could not be set up")
    print("── summary")
    for version, (passed, last) in found.items():
        print(f"ComfyUI {version}: {'passed' if passed else 'FAILED'}: {last}")
    return 0 if all(passed for passed, _ in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
