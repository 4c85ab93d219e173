"""The import contracts of pyproject.toml refuse what they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tools import lint
from tools.host import ROOT

FORBIDDEN = {
    "d2m_model/experts.py": "import comfy.ops",
    "d2m_model/moe.py": "from d2m_train.distillation import losses",
    "d2m_model/conversion/importance.py": "import diffusers",
    "nodes/files/convert_node.py": "from ...d2m_train.distillation import losses",
    "nodes/files/load_node.py": "from d2m_model import experts",
    "nodes/lora/load_lora.py": "from ..controls import control_node",  # a room beside it
    "nodes/model/settings.py": "from ..controls import control_node",  # a room above it
    "d2m_train/distillation/losses.py": "import comfy.sd",
    "d2m_train/flow/velocity.py": "import deepspeed",
}


def contracts_of(pack: Path) -> subprocess.CompletedProcess[str]:
    """Check a pack that has the files of this one, empty but for those that are there."""
    for top in ("d2m_model", "d2m_train", "nodes", "demo", "tools"):
        for file in (ROOT / top).rglob("*.py"):
            (pack / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (pack / file.relative_to(ROOT)).touch()
    (pack / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", pack)
    return lint.check("import contracts", pack)


def test_every_import_across_the_wings_breaks_a_contract(tmp_path: Path) -> None:
    for file, line in FORBIDDEN.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(line + "\n")
    done = contracts_of(tmp_path)
    assert done.returncode != 0
    for file in FORBIDDEN:
        module = file.removesuffix(".py").replace("/", ".")
        assert re.search(rf"{re.escape(module)} -> ", done.stdout), module


def test_the_diffusers_host_may_import_diffusers(tmp_path: Path) -> None:
    host = tmp_path / "d2m_model" / "hosts" / "diffusers"
    host.mkdir(parents=True)
    (host / "__init__.py").write_text("import diffusers\n")
    done = contracts_of(tmp_path)
    assert done.returncode == 0, done.stdout
