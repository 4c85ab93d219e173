"""The command line `python -m d2m_train COMMAND`; each command is a module of commands/."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from d2m_model import VERSION
from d2m_model.checkpoint import CheckpointError
from d2m_model.fields import ConfigError

from . import UserError
from .text_file import expand_home

_COMMANDS = {
    "convert": ("convert", "convert a dense FLUX to a FLUX-MoE"),
    "unconvert": ("unconvert", "convert a FLUX-MoE back to a dense FLUX"),
    "inspect": ("inspect", "describe a FLUX file and check it"),
    "sensitivity": ("sensitivity", "measure where a FLUX-MoE needs experts, for a compute budget"),
    "report": ("report", "show parameters and FLOPs of the presets"),
    "cache": ("cache", "encode a run's data before training"),
    "distill": ("distill", "train a FLUX-MoE to imitate its teacher, in stages"),
    "export": ("export", "write a FLUX-MoE in another precision, or for diffusers"),
    "evaluate": ("evaluate", "sample prompts with a FLUX and score the images"),
    "analyze": ("analyze", "draw what blocks and experts do: the paper's Figs. 3, 6 and 8"),
}
EXAMPLES = {
    "convert": (
        "convert --teacher flux1-dev.safetensors --out flux-moe-L.safetensors --data latents.safetensors",
        "convert --teacher flux1-dev.safetensors --out flux-moe-L.safetensors --split-only",
    ),
    "unconvert": ("unconvert flux-moe-L.safetensors --out dense-again.safetensors",),
    "inspect": ("inspect flux-moe-L.safetensors",),
    "sensitivity": (
        "sensitivity flux-moe-L.safetensors --teacher flux1-dev.safetensors --data data.safetensors --out new.safetensors",
    ),
    "report": ("report --preset all",),
    "cache": ("cache run.yaml",),
    "distill": (
        "distill configs/emoji-smoke.yaml",
        "distill --fields",
        "distill run.yaml configs/hardware/1x80gb.yaml --dry-run --gpu-memory 80GB",
        "distill run.yaml resume=latest training.batch_size=2 output_dir=/runs/second",
    ),
    "export": ("export runs/first/experts/student.safetensors --out student-fp16.safetensors --dtype float16",),
    "evaluate": ("evaluate student.safetensors --teacher flux1-dev.safetensors --data prompts.txt",),
    "analyze": ("analyze student.safetensors --what experts --data prompts.txt",),
}
_INTERRUPTED = 128 + 2  # exit status after Ctrl-C
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXTRA = (
    "diffusers",
    "accelerate",
    "transformers",
    "tqdm",
    "PIL",
    "yaml",
    "matplotlib",
    "pyarrow",
    "tensorboard",
    "torchmetrics",
    "scipy",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Return its exit status.

    That is 2, with one line on standard error, for an error that the user can correct, and 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m d2m_train",
        description=__doc__,
        epilog=_examples(first for first, *_ in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dense2moe-flux {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.epilog = _examples(EXAMPLES[name])
        if name in arguments[:1]:  # other commands are not imported
            module = importlib.import_module(f".commands.{module_name}", __package__)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    chosen = parser.parse_args(arguments)
    for name, value in vars(chosen).items():
        if isinstance(value, Path):  # a shell leaves the ~ of --out=~/file
            setattr(chosen, name, expand_home(value))
    try:
        status: int = chosen.run(chosen)
    except (UserError, CheckpointError, ConfigError) as error:
        message = str(error)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        file = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror}{file}. Make room; a run goes on with resume=latest."
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        message = f"{error.name} is not installed. Install the trainer's packages: pip install 'dense2moe-flux[train]'"
    except KeyboardInterrupt:
        print("Interrupted. A run goes on with resume=latest.", file=sys.stderr)
        return _INTERRUPTED
    else:
        return status
    print(f"error: {message}", file=sys.stderr)
    return 2


def _examples(lines: Iterable[str]) -> str:
    return "\n".join(["Examples:", *(f"  python -m d2m_train {line}" for line in lines)])


if __name__ == "__main__":
    sys.exit(main())
