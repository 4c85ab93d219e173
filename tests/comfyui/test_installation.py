"""The pack's files that a ComfyUI installation reads, and the file that tells a ComfyUI where the pack is."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tools import host
from tools.host import ROOT, host_in_use
from tools.packages import requirements

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def names(lines: list[str]) -> set[str]:
    """Package names of requirement lines."""
    matches = (NAME.match(line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in matches if match}


def test_the_pack_needs_nothing_beyond_comfyui() -> None:
    of_comfyui = names(host_in_use().requirements.read_text().splitlines())
    assert names((ROOT / "requirements.txt").read_text().splitlines()) <= of_comfyui
    assert {"torch", "safetensors"} <= names(requirements(ROOT, extras=())) <= of_comfyui


def test_every_requirement_is_pinned_without_addresses() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    required = names([*requirements(ROOT), *host_in_use().requirements.read_text().splitlines()])
    pinned = names(pins.splitlines())
    assert required - pinned <= names(["glfw"])  # of ComfyUI 0.18.2 only
    assert "://" not in pins


def test_comfyui_reads_the_project_file() -> None:
    used = host_in_use()
    code = (
        "from comfy_config.config_parser import extract_node_configuration as read\n"
        f"config = read({str(ROOT)!r})\n"
        "print(config.project.name, config.tool_comfy.display_name, config.project.license.text,"
        " config.project.supported_comfyui_version, bool(config.tool_comfy.publisher_id))"
    )
    done = subprocess.run([str(used.python), "-c", code], cwd=used.path, capture_output=True, text=True)
    assert done.stdout.split() == ["dense2moe-flux", "ComfyUI-Dense2MoE", "Apache-2.0", ">=0.18.2", "True"], done.stderr


def test_make_host_prints_the_path_of_a_comfyui_and_nothing_else() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "-s", "host"], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.removesuffix("\n")) / "main.py").is_file()


def test_the_server_finds_the_pack_without_a_file_in_its_own_folder(tmp_path: Path) -> None:
    used = host_in_use()
    arguments = host.server_command(ROOT, used, tmp_path)[2:]
    code = (
        "import comfy.options; comfy.options.enable_args_parsing()\n"
        "import os, folder_paths, utils.extra_config; from comfy.cli_args import args\n"
        "utils.extra_config.load_extra_path_config(args.extra_model_paths_config[0][0])\n"
        "print(*(os.path.join(f, n) for f in folder_paths.get_folder_paths('custom_nodes') for n in os.listdir(f)))"
    )
    command = [str(used.python), "-c", code, *arguments]
    done = subprocess.run(command, cwd=used.path, capture_output=True, text=True)
    [pack] = done.stdout.split()
    assert Path(pack).name == host.PACK_NAME
    assert Path(pack).samefile(ROOT)
