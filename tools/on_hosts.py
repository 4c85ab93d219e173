"""`make test-hosts`: the tests that run in a ComfyUI, in every release of the table, each with its own environment.

`python -m tools.on_hosts [ARGUMENT …]` passes the arguments to pytest in place of the default selection of tests.
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
from tools.setup import set_up

# Tests that run in a host or depend on the packages that it pins.
_TESTS = (
    "tests/comfyui",
    "tests/browser",
    "tests/unit/test_setup.py",
    "tests/unit/test_diffusers_block_groups.py",
    "tests/unit/test_diffusers_loading.py",
    "tests/unit/test_diffusers_round_trips.py",
    "tests/unit/test_diffusers_loras.py",
    "tests/unit/test_experts.py",
)
_SUMMARY = re.compile(r"\d+ (passed|failed|error|skipped|deselected|no tests ran)")  # pytest's last line


def run(root: Path, host: Host, arguments: Sequence[str]) -> tuple[bool, str]:
    """Run pytest in this host's environment and print its output; return whether all passed, and the last line."""
    assert host.release is not None
    environ = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    environ["D2M_HOST"] = host.release.comfyui
    command = [str(host.python), "-m", "pytest", *arguments]
    last = "pytest did not run"
    with subprocess.Popen(command, cwd=root, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if _SUMMARY.search(line):
                last = line.strip("= \n")
    return process.returncode == 0, last


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Set up and test every release; return 1 if any of them fails."""
    results: dict[str, tuple[bool, str]] = {}
    for release in RELEASES:
        host = released_host(root, release)
        print(f"── ComfyUI {release.comfyui} ({host.venv.name})", flush=True)
        try:
            set_up(root, host)
            results[release.comfyui] = run(root, host, arguments or _TESTS)
        except SetupError as error:
            print(f"error: {error}", file=sys.stderr)
            results[release.comfyui] = (False, "set-up failed")
    print("── summary")
    for version, (passed, last) in results.items():
        print(f"ComfyUI {version}: {'passed' if passed else 'FAILED'}: {last}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
