"""The demo's models: the conversion of the emoji FLUX, and files for the demo's ComfyUI.

python -m demo.models    # converts the emoji FLUX again, to the FLUX-MoE that ships in demo/assets
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from d2m_model.atomic import atomic_file
from demo import dataset
from demo.server import PATIENT_THREADS
from tools.host import ROOT

OUT = ROOT / "demo" / "out"
COMFYUI = OUT / "comfyui"  # models, input, output and user data of the demo's ComfyUI
# Names in ComfyUI, which finds the files in demo/assets by itself: nodes/demo.py
TEACHER = dataset.EMOJI_TEACHER.name
CONVERTED = dataset.EMOJI_FLUX_MOE.name
AUTOENCODER = dataset.EMOJI_AUTOENCODER.name
LORA = dataset.SEPIA_LORA.name


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


def add_diffusion_model(base: Path, file: Path, name: str) -> None:
    """Put a FLUX into ComfyUI's model folder under `base`, atomically. It comes before the one that ships."""
    target = base / "models" / "diffusion_models" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as part:
        shutil.copyfile(file, part)


def convert_teacher(out: Path, *options: str) -> None:
    """Convert the emoji FLUX to the file `out`, without training; `options` are further ones of the command."""
    out.parent.mkdir(parents=True, exist_ok=True)
    run_trainer(
        "convert",
        "--teacher",
        dataset.EMOJI_TEACHER,
        "--out",
        out,
        "--overwrite",
        "--preset",
        "L",
        "--data",
        "emoji",
        *options,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / CONVERTED
        convert_teacher(converted, "--sensitivity")  # writes a report beside the file
        with atomic_file(dataset.EMOJI_FLUX_MOE) as part:
            shutil.copyfile(converted, part)


if __name__ == "__main__":
    main()
