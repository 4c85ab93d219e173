"""The house rules: style, types, who may import whom, and what a ComfyUI installation reads of the pack."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import lint
from tools.host import ROOT, host_in_use
from tools.packages import requirements

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def names(lines: list[str]) -> set[str]:
    """Package names of requirement lines."""
    found = (NAME.match(line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in found if match}


@pytest.mark.parametrize("name", lint.CHECKS)
def test_the_house_is_in_order(name: str) -> None:
    done = lint.check(name)
    assert done.returncode == 0, done.stdout + done.stderr


FORBIDDEN = {
    "d2m_model/experts.py": "import comfy.ops",
    "d2m_model/moe.py": "from d2m_train.distillation import losses",
    "d2m_model/conversion/importance.py": "import diffusers",
    "nodes/files/convert_node.py": "from ...d2m_train.distillation import losses",
    "nodes/files/load_node.py": "from d2m_model import experts",
    "d2m_train/distillation/losses.py": "import comfy.sd",
}


def contracts_of(pack: Path) -> subprocess.CompletedProcess[str]:
    for file in FORBIDDEN:
        (pack / file).parent.mkdir(parents=True, exist_ok=True)
        for folder in (pack, pack / file.split("/")[0], (pack / file).parent):
            (folder / "__init__.py").touch()
        (pack / file).touch()
    for other in ("demo", "tools"):
        (pack / other).mkdir()
        (pack / other / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", pack)
    return lint.check("import contracts", pack)


@pytest.mark.parametrize("file", FORBIDDEN)
def test_an_import_across_the_wings_breaks_a_contract(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(FORBIDDEN[file] + "\n")
    done = contracts_of(tmp_path)
    assert done.returncode != 0
    assert file.removesuffix(".py").replace("/", ".") in done.stdout


def test_the_diffusers_host_may_import_diffusers(tmp_path: Path) -> None:
    hosts = tmp_path / "d2m_model" / "hosts"
    hosts.mkdir(parents=True)
    (hosts / "__init__.py").touch()
    (hosts / "diffusers.py").write_text("import diffusers\n")
    done = contracts_of(tmp_path)
    assert done.returncode == 0, done.stdout


def test_collecting_the_tests_does_not_import_the_root_of_the_pack() -> None:
    """It is ComfyUI's door; imported by pytest it would be a second copy of everything."""
    code = (
        "import pytest, sys\n"
        "status = pytest.main(['--collect-only', '-qq', 'tests'])\n"
        f"doors = [n for n, m in sys.modules.items() if getattr(m, '__file__', None) == {str(ROOT / '__init__.py')!r}]\n"
        "sys.exit(int(status) or len(doors))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_pack_needs_nothing_beyond_comfyui() -> None:
    of_comfyui = names(host_in_use().requirements.read_text().splitlines())
    assert names((ROOT / "requirements.txt").read_text().splitlines()) <= of_comfyui
    assert {"torch", "safetensors"} <= names(requirements(ROOT, extras=())) <= of_comfyui


def test_everything_that_is_asked_for_is_pinned_without_addresses() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    asked = names([*requirements(ROOT), *host_in_use().requirements.read_text().splitlines()])
    pinned = names(pins.splitlines())
    assert asked - pinned <= names(["glfw"])  # of ComfyUI 0.18.2 only
    assert "://" not in pins


def test_comfyui_reads_the_project_file() -> None:
    host = host_in_use()
    code = (
        "from comfy_config.config_parser import extract_node_configuration as read\n"
        f"config = read({str(ROOT)!r})\n"
        "print(config.project.name, config.tool_comfy.display_name, config.project.license.text,"
        " config.project.supported_comfyui_version, bool(config.tool_comfy.publisher_id))"
    )
    done = subprocess.run([str(host.python), "-c", code], cwd=host.path, capture_output=True, text=True)
    assert done.stdout.split() == ["dense2moe-flux", "ComfyUI-Dense2MoE", "Apache-2.0", ">=0.18.2", "True"], done.stderr
