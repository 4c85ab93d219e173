"""The demo's models: their files, the conversion of the teacher, and ComfyUI's folders for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from d2m_model.atomic import atomic_file
from demo.dataset import ASSETS
from demo.server import PATIENT_THREADS
from tools.host import ROOT

OUT = ROOT / "demo" / "out"
COMFYUI = OUT / "comfyui"  # models, input, output and user data of the demo's ComfyUI
TEACHER = "emoji-flux.safetensors"
CONVERTED = "emoji-flux-moe.safetensors"
AUTOENCODER = "emoji-autoencoder.safetensors"
LORA = "emoji-sepia-lora.safetensors"


def run_trainer(*arguments: str | Path, quiet: bool = False) -> None:
    """Run a command of `python -m d2m_train`, as a user does. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "d2m_train", *map(str, arguments)]
    subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        env={**os.environ, **PATIENT_THREADS},
        stdout=subprocess.DEVNULL if quiet else None,
    )


def add_models(base: Path) -> None:
    """Put the teacher, the autoencoder and the LoRA into ComfyUI's model folders under `base`."""
    for folder, name, asset in (
        ("diffusion_models", TEACHER, TEACHER),
        ("vae", AUTOENCODER, "autoencoder.safetensors"),
        ("loras", LORA, LORA),
    ):
        target = base / "models" / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ASSETS / asset, target)


def add_diffusion_model(base: Path, file: Path, name: str) -> None:
    """Put a FLUX into ComfyUI's model folder under `base`, atomically."""
    target = base / "models" / "diffusion_models" / name
    with atomic_file(target) as part:
        shutil.copyfile(file, part)


def convert_teacher(base: Path) -> None:
    """Convert the teacher to OUT/CONVERTED and put it into ComfyUI's model folder under `base`."""
    OUT.mkdir(parents=True, exist_ok=True)
    converted = OUT / CONVERTED
    run_trainer(
        "convert", "--teacher", ASSETS / TEACHER, "--out", converted, "--overwrite", "--preset", "L", "--data", "emoji"
    )
    add_diffusion_model(base, converted, CONVERTED)
