"""Mutated files into the reader, `inspect` and ComfyUI's loaders: a clear error or a correct load, and nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import safetensors
import torch
from torch import Tensor

from d2m_model.checkpoint import CONFIG_KEY, check_file
from d2m_model.config import FluxMoEConfig
from d2m_model.foreign import MessageError
from d2m_model.keys import bfl_spelling, prefix_of
from d2m_model.teacher import open_teacher
from d2m_model.tensor_file import TensorFile
from d2m_train import UserError
from d2m_train.__main__ import main as command_line
from d2m_train.teacher.loras import LoraDeltas
from demo.in_process import Comfy
from tests.trust import subjects
from tests.trust.limits import Fault, Hang, Peak, raised_by_us, time_limit
from tests.trust.mutations import mutated
from tools.host import ROOT

_SECONDS = 20.0  # for one file, which takes a tenth of a second
_BYTES, _TIMES = 24 << 20, 6  # memory that may be taken: so many bytes, and so many times the file
_ADDRESSES = 4 << 30  # bytes of addresses that a file may ask for, so that a fault does not take the machine's memory
_KEPT = 40  # files of each form that reached new lines
_CLEAR = (MessageError, UserError)
_WATCHED = tuple(str(ROOT / part) for part in ("d2m_model/", "d2m_train/commands/inspect.py", "d2m_train/teacher/"))

Reader = Callable[[Path], bool]  # returns whether it took the file; raises _CLEAR, or Wrong


class Wrong(Exception):
    """A reader took a file and gave something else than is in it."""


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Read `count` mutated files. Return counts. Raises Fault."""
    models, loras = subjects.write_models(folder), subjects.write_loras(folder)
    index = subjects.write_shards(folder / "shards")
    host = Comfy(folder / "comfyui")
    host.load_pack()
    logging.disable(logging.CRITICAL)
    readers = Readers(host, models["FLUX-MoE"])
    forms: list[tuple[str, Path, tuple[Reader, ...]]] = [
        *((form, path, (readers.check, readers.inspect, readers.load)) for form, path in models.items()),
        *((form, path, (readers.fuse, readers.patch)) for form, path in loras.items()),
        ("index of shards", index, (readers.teacher,)),
    ]
    for form, path, used in forms:
        verdicts = [outcome_of(reader, path, path.stat().st_size) for reader in used]
        if "taken" not in verdicts or not set(verdicts) <= {"taken", "refused"}:
            raise Fault(f"the sound file {form!r} is not taken: {verdicts}")
    kept = {form: [path.read_bytes()] for form, path, _ in forms}
    outcomes: Counter[str] = Counter()
    lines = Lines()
    for number in range(count):
        random = Random(f"{seed}-{number}")
        form, path, used = random.choice(forms)
        data = mutated(random.choice(kept[form]), random)
        case = path.with_name(f"case{path.suffix}")
        case.write_bytes(data)
        new_lines = False
        for reader in used:
            with lines:
                outcome = outcome_of(reader, case, len(data))
            if outcome not in ("refused", "taken"):
                saved = folder.parent / f"fault-{seed}-{number}{path.suffix}"
                saved.write_bytes(data)
                raise Fault(f"number {number}, {form!r}, {reader.__name__}: {outcome}\nThe file is kept as {saved}.")
            outcomes[outcome] += 1
            new_lines |= lines.grown()
        if new_lines and len(kept[form]) < _KEPT:
            kept[form].append(data)
        if (number + 1) % 500 == 0:
            print(f"files: {number + 1} of {count}, {dict(outcomes)}, {len(lines.seen)} lines reached", flush=True)
    return {
        "files": count,
        "readings": outcomes.total(),
        "refused": outcomes["refused"],
        "taken": outcomes["taken"],
        "kept_for_new_lines": sum(map(len, kept.values())) - len(kept),
        "lines_reached": len(lines.seen),
    }


def outcome_of(reader: Reader, path: Path, size: int) -> str:
    """Return "taken" or "refused", or a description of what went wrong."""
    peak = Peak()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + _ADDRESSES, hard))
    try:
        with time_limit(_SECONDS):
            outcome = "taken" if reader(path) else "refused"
    except _CLEAR as error:
        outcome = "refused"
        if not all(c.isprintable() or c == "\n" for c in str(error)):
            return f"a message with what cannot be printed: {str(error)!r}"
    except (Exception, Hang) as error:
        return "".join(traceback.format_exception(error))[-4000:]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if (grown := peak.growth()) > _BYTES + _TIMES * size:
        return f"{outcome}, with {grown:,} bytes of memory for a file of {size:,}"
    return outcome


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class Lines:
    """Lines of the readers that were reached, while it is entered."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self._watched: dict[str, bool] = {}
        self._known = 0

    def __enter__(self) -> None:
        sys.settrace(self._call)

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def grown(self) -> bool:
        """Return whether there are more than at the last call."""
        before, self._known = self._known, len(self.seen)
        return self._known > before

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        watched = self._watched.get(name)
        if watched is None:
            watched = self._watched[name] = name.startswith(_WATCHED)
        return self._line if watched else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


class Readers:
    """Everything that opens files of others. A method returns whether it took the file."""

    def __init__(self, host: Comfy, moe: Path) -> None:
        self._load = host.module("nodes.files.load_node").load_flux_moe
        self._moe = host.load(moe)

    def check(self, path: Path) -> bool:
        """The reader, with each tensor compared with what safetensors' own library reads."""
        config = check_file(path)
        with TensorFile(path) as file:
            _compare(path, {name: file.tensor(name) for name in file.shapes})
            stored = json.loads(bytes(file.tensor(CONFIG_KEY).numpy()))
        if (
            json.loads(config.to_json())["ffns"] != stored["ffns"]
            or FluxMoEConfig.from_json(config.to_json()) != config
        ):
            raise Wrong("another configuration than the file's")
        return True

    def teacher(self, path: Path) -> bool:
        with open_teacher(path) as teacher:
            teacher.check_values()
        return True

    def inspect(self, path: Path) -> bool:
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = command_line(["inspect", str(path)])
        printed = out.getvalue() + errors.getvalue()
        if not all(c.isprintable() or c == "\n" for c in printed):
            raise Wrong(f"inspect prints {printed!r}")
        if status:
            return False
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            prefix = prefix_of(dict.fromkeys(names))
            for name in names:
                tensor = file.get_tensor(name)
                if name.startswith(prefix) and tensor.is_floating_point() and not tensor.float().isfinite().all():
                    raise Wrong(f"inspect says that {path} is sound; {name} has NaN or infinity")
        return True

    def load(self, path: Path) -> bool:
        """Load FLUX-MoE, with each weight compared with the file's."""
        model = self._load(str(path))
        weights = {bfl_spelling(name): tensor for name, tensor in model.model.diffusion_model.state_dict().items()}
        with TensorFile(path) as file:
            for name in file.shapes:
                found, expected = weights.get(name), file.tensor(name)
                if found is None or type(found) is not Tensor or found.shape != expected.shape:
                    continue  # what quantising tools add, and what ComfyUI quantises
                if not torch.equal(found.float().nan_to_num(), expected.to(found.dtype).float().nan_to_num()):
                    raise Wrong(f"Load FLUX-MoE: {name} is not what the file has")
        return True

    def fuse(self, path: Path) -> bool:
        """The trainer's LoRAs, fused into one weight."""
        deltas = LoraDeltas(subjects.DIMS, [(path, 1.0)])
        name = min(deltas.names)
        deltas.fused(name, subjects.dense()[name])
        return True

    def patch(self, path: Path) -> bool:
        """ComfyUI's Load LoRA on a FLUX-MoE. Errors of ComfyUI's own code are not ours."""
        import comfy.sd
        import comfy.utils

        try:
            lora = comfy.utils.load_torch_file(str(path), safe_load=True)
            model, _ = comfy.sd.load_lora_for_models(self._moe, None, lora, 1.0, 0)
            model.patch_model()
            model.unpatch_model()
        except Exception as error:
            if raised_by_us(error) and not isinstance(error, ValueError):
                raise
            return False
        return True


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    with safetensors.safe_open(path, "pt") as file:
        names = list(file.keys())
        prefix = prefix_of(dict.fromkeys(names))
        stored = {bfl_spelling(name.removeprefix(prefix)): name for name in names if name.startswith(prefix)}
        if set(stored) != set(tensors):
            raise Wrong(f"other tensors than safetensors reads: {set(stored) ^ set(tensors)}")
        for name, tensor in tensors.items():
            if _bytes(file.get_tensor(stored[name])) != _bytes(tensor):
                raise Wrong(f"{name} is not what safetensors reads")


def _bytes(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
