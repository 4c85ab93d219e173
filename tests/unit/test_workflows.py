"""Continuous integration runs what a developer can run, on the supported releases, with actions that cannot change."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from d2m_model import VERSION
from tools.host import RELEASES, ROOT

GITHUB = ROOT / ".github"
FILES = sorted(GITHUB.rglob("*.yml"))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(GITHUB)))
def test_actions_of_others_are_pinned_by_commit_and_name_their_version(path: Path) -> None:
    uses = re.findall(r"uses: (\S+)(.*)", path.read_text())
    foreign = [(action, comment) for action, comment in uses if not action.startswith("./")]
    for action, comment in foreign:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.match(r" # v\d", comment), action


def test_the_tests_run_on_every_supported_comfyui_and_python() -> None:
    jobs = read(GITHUB / "workflows" / "ci.yml")["jobs"]
    releases = [release.comfyui for release in RELEASES]
    assert jobs["comfyui"]["strategy"]["matrix"]["comfyui"] == releases
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert jobs["python"]["strategy"]["matrix"]["python"][0] == oldest[1]


def test_every_job_has_a_limit_and_runs_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for job in read(GITHUB / "workflows" / "ci.yml")["jobs"].values():
        assert job["timeout-minutes"] <= 60
        tiers = job.get("strategy", {}).get("matrix", {}).get("tier", [""])
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands
        for tier in tiers:
            for command in commands:
                assert command.replace("${{ matrix.tier }}", tier).split()[1] in targets


@pytest.mark.parametrize(("tag", "fits"), [(f"v{VERSION}", True), ("v99.0.0", False), (VERSION, False)])
def test_a_tag_of_another_version_is_not_published(tag: str, fits: bool) -> None:
    steps = read(GITHUB / "workflows" / "publish.yml")["jobs"]["version"]["steps"]
    (script,) = [step["run"] for step in steps if "run" in step]
    environ = {**os.environ, "GITHUB_REF_NAME": tag}
    done = subprocess.run(["bash", "-ec", script], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.returncode == 0) is fits, done.stdout + done.stderr
    assert fits or f"expected the tag v{VERSION}" in done.stdout
