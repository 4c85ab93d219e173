"""Kills at random moments while files, folders, checkpoints and caches are written, and in the stages of a run.

There is the old file or the new one, each whole; the same work done again ends as if nothing had been killed, bit for
bit, and leaves nothing else behind.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

import d2m_model.hosts.diffusers  # noqa: F401 (children of this process need not import it)
import d2m_train.commands.convert
import d2m_train.commands.export
import d2m_train.commands.unconvert  # noqa: F401
from d2m_model.conversion.unconvert import unconvert_file
from d2m_train.__main__ import main as command_line
from d2m_train.data.store import Store
from d2m_train.training.checkpoints import Checkpoints
from demo.in_process import Comfy
from tests.toys.runs import DDP, run_file, write_inputs
from tests.toys.trainer_process import Run
from tests.trust import subjects
from tests.trust.limits import Fault

_SECONDS = 300.0  # for one piece of work
_RUNS_EVERY = 8  # kills: one of so many is in a whole run
_STAGES = ("convert", "shared", "experts", "blocks")
_CHECKPOINTS, _KEPT, _ENTRIES = 6, 2, 40
_KIND = "latents"  # of a cache's entries


@dataclass(frozen=True)
class Work:
    """Something that writes into a folder.

    write   does it, in version 0 or 1
    target  the file or folder that is the old one or the new one after a kill; "" if `check` judges
    check   raises an exception if what a kill left is not sound
    kept    what may stay besides the result: it is removed later, since other machines may use it
    """

    write: Callable[[Path, int], None]
    target: str = ""
    check: Callable[[Path], None] = lambda folder: None
    kept: tuple[str, ...] = ()


def measure(count: int, seed: int, base: Path) -> dict[str, Any]:
    """Kill `count` times. Return counts. Raises Fault."""
    inputs = base / "inputs"
    inputs.mkdir()
    write_inputs(inputs)
    works = _works(inputs, subjects.write_models(inputs))
    clean: dict[str, tuple[float, list[dict[str, str]]]] = {}
    for name, work in works.items():
        start = time.monotonic()
        for version in (0, 1):
            _finish(work, base / name / str(version), version)
        listings = [_listing(base / name / str(version), work) for version in (0, 1)]
        clean[name] = (time.monotonic() - start) / 2, listings
        if (
            _listing(base / name / "0", work, work.target) == _listing(base / name / "1", work, work.target)
            and work.target
        ):
            raise Fault(f"{name}: both versions are the same, so that nothing is tested")
    runs = RunKills(inputs, base / "runs")
    outcomes: Counter[str] = Counter()
    for number in range(count):
        random = Random(f"{seed}-{number}")
        if number % _RUNS_EVERY == _RUNS_EVERY - 1:
            outcomes[runs.kill(random, number)] += 1
        else:
            name = random.choice(sorted(works))
            folder = base / "killed" / str(number)
            try:
                outcomes[_kill(works[name], folder, *clean[name], random)] += 1
            except Fault as fault:
                raise Fault(f"number {number}, {name}: {fault}") from None
        if number % 10 == 9:
            print(f"kills: {number + 1} of {count}, {dict(outcomes)}", flush=True)
    return {"kills": count, "works": sorted(works), "outcomes": dict(sorted(outcomes.items()))}


def _kill(work: Work, folder: Path, seconds: float, clean: list[dict[str, str]], random: Random) -> str:
    with_old = random.random() < 0.5
    if with_old:
        _finish(work, folder, 0)
    folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.rglob("*")}
    process = _begin(work, folder, 1)
    if random.random() < 0.5:  # at any moment, or once something is being written
        time.sleep(random.uniform(0, 1.1 * seconds))
    else:
        end = time.monotonic() + seconds
        while {path.name for path in folder.rglob("*")} == before and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(random.choice((0, random.uniform(0, 0.02), random.uniform(0, 0.3))))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if status not in (0, signal.SIGKILL):
        raise Fault(f"it failed before it was killed: {_trouble(folder)}")
    work.check(folder)
    outcome = "finished before" if status == 0 else "left a sound state"
    if work.target:
        found = _listing(folder, work, work.target)
        versions = [{path: digest for path, digest in files.items() if _within(path, work.target)} for files in clean]
        if found == versions[1]:
            outcome = outcome if status == 0 else "left the new"
        elif found == versions[0] and with_old:
            outcome = "left the old"
        elif not found and not with_old:
            outcome = "left nothing"
        else:
            raise Fault(f"{work.target} is neither the old one nor the new one")
    _finish(work, folder, 1)
    if (listing := _listing(folder, work)) != clean[1]:
        differ = sorted(path for path in {*listing, *clean[1]} if listing.get(path) != clean[1].get(path))
        raise Fault(f"done again it differs in, or leaves: {differ}")
    return outcome


def _begin(work: Work, folder: Path, version: int) -> int:
    """Do the work in a copy of this process. Return its id."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    try:
        signal.alarm(int(_SECONDS))
        output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work.write(folder, version)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _finish(work: Work, folder: Path, version: int) -> None:
    _, status = os.waitpid(_begin(work, folder, version), 0)
    if status:
        raise Fault(f"it fails ({status}): {_trouble(folder)}")


def _trouble(folder: Path) -> str:
    return folder.with_suffix(".log").read_text(errors="replace")[-2000:]


def _within(path: str, target: str) -> bool:
    return path == target or path.startswith(f"{target}/")


def _listing(folder: Path, work: Work, target: str = "") -> dict[str, str]:
    """Return the files' digests by path, of the whole folder or of `target`. Reports have times, so their text is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith(work.kept or ("\0",)) and (not target or _within(name, target)):
            digest = "" if name.endswith((".report.json", "checkpoint.json", ".metadata")) else _digest(path)
            found[name] = digest
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _works(inputs: Path, models: dict[str, Path]) -> dict[str, Work]:
    host = Comfy(inputs / "comfyui")
    host.load_pack()
    save_model = host.module("nodes.files.save_node").save_model
    teacher, moe = str(inputs / "teacher.safetensors"), models["FLUX-MoE"]

    def command(*arguments: str) -> None:
        if (status := command_line(arguments)) != 0:
            raise RuntimeError(f"{arguments[0]} ended with {status}")

    def convert(folder: Path, version: int) -> None:
        options = [
            "--data",
            str(inputs / "latents.safetensors"),
            "--batches",
            "2",
            "--batch-size",
            "2",
            "--tokens",
            "64",
        ]
        command(
            *("convert", "--teacher", teacher, "--out", str(folder / "file.safetensors"), "--overwrite"),
            *(["--split-only"] if version == 0 else options),
        )

    def unconvert(folder: Path, version: int) -> None:
        source = moe if version == 0 else models["with means and compressed modulations"]
        unconvert_file(source, folder / "file.safetensors", lambda done: None)

    def export(folder: Path, version: int) -> None:
        dtype = ("float16", "float32")[version]
        command("export", str(moe), "--out", str(folder / "file.safetensors"), "--overwrite", "--dtype", dtype)

    def export_to_diffusers(folder: Path, version: int) -> None:
        dtype = ("float16", "float32")[version]
        command("export", str(moe), "--out", str(folder / "model"), "--overwrite", "--diffusers", "--dtype", dtype)

    def save(folder: Path, version: int) -> None:
        source = moe if version == 0 else models["with block groups and capacity routers"]
        with torch.inference_mode():
            save_model(host.load(source), folder / "file.safetensors", {})

    return {
        "convert": Work(convert, "file.safetensors"),
        "unconvert": Work(unconvert, "file.safetensors"),
        "export": Work(export, "file.safetensors"),
        "export --diffusers": Work(export_to_diffusers, "model"),
        "Save FLUX-MoE": Work(save, "file.safetensors"),
        "checkpoints": Work(_save_checkpoints, check=_check_checkpoints),
        "cache": Work(_fill_cache, check=_check_cache, kept=(".unfinished",)),
    }


# Checkpoints and caches


def _state(step: int) -> dict[str, Any]:
    return {"weights": {str(index): torch.full((1 << 16,), step + index / 10) for index in range(10)}}


def _open_checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", {"seed": 0}, keep=_KEPT, main=True, wait=lambda: None)


def _save_checkpoints(folder: Path, version: int) -> None:
    """Go on at the last checkpoint, as a run does."""
    checkpoints = _open_checkpoints(folder)
    checkpoints.clean()
    if version == 1 and checkpoints.steps() == [_CHECKPOINTS - 1, _CHECKPOINTS]:
        checkpoints.save(_CHECKPOINTS, _state(_CHECKPOINTS), {})
    for step in range((checkpoints.steps() or [0])[-1] + 1, _CHECKPOINTS + 1):
        checkpoints.save(step, _state(step), {})


def _check_checkpoints(folder: Path) -> None:
    checkpoints = _open_checkpoints(folder)
    for step in checkpoints.steps():
        state = _state(0)
        checkpoints.load(step, state)
        if not all(torch.equal(tensor, _state(step)["weights"][name]) for name, tensor in state["weights"].items()):
            raise Fault(f"checkpoint {step} has another state")


def _entry(number: int) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((1 << 14,), float(number))}


def _fill_cache(folder: Path, version: int) -> None:
    store = Store(folder)
    for number in range(_ENTRIES):
        if version == 1 or not store.has(_KIND, f"{number:08}"):
            store.put(_KIND, f"{number:08}", _entry(number))
        store.write_json("index", number)


def _check_cache(folder: Path) -> None:
    store = Store(folder)
    for number in range(_ENTRIES):
        stored = store.get(_KIND, f"{number:08}")  # raises DamagedEntry
        if stored is not None and not torch.equal(stored["latents"], _entry(number)["latents"]):
            raise Fault(f"entry {number} has another content")


# Runs


class RunKills:
    """Runs of all stages, in one and in two processes, that are killed and go on."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._file = run_file(inputs, student={"preset": "S"}, training={"ema": 0.9})
        self._finished: dict[int, tuple[float, dict[str, Any]]] = {}  # by number of processes

    def kill(self, random: Random, number: int) -> str:
        ranks = random.choice((1, 1, 2))
        if ranks not in self._finished:
            start, whole = time.monotonic(), self._folder / f"whole-{ranks}"
            self._run(whole, ranks).wait().succeed()
            self._finished[ranks] = time.monotonic() - start, self._weights(whole)
        seconds, expected = self._finished[ranks]
        out = self._folder / str(number)
        for _ in range(random.choice((1, 2))):
            run = self._run(out, ranks)
            time.sleep(random.uniform(0, seconds))
            run.send_signal(signal.SIGKILL)
            run.wait()
        result = self._run(out, ranks).wait()
        if result.returncode:
            raise Fault(f"number {number}: the run of {ranks} does not go on: {result.output[-2000:]}")
        found = self._weights(out)
        if differ := [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]:
            raise Fault(f"number {number}: the run of {ranks} ends elsewhere: {differ[:5]}")
        if litter := [path for path in out.rglob("*") if path.name.endswith((".part", ".partial"))]:
            raise Fault(f"number {number}: the run of {ranks} leaves {litter}")
        return f"run of {ranks} went on"

    def _run(self, out: Path, ranks: int) -> Run:
        arguments = ["distill", str(self._file), f"output_dir={out}", "resume=latest"]
        return Run(arguments, ranks, DDP if ranks > 1 else None)

    def _weights(self, out: Path) -> dict[str, torch.Tensor]:
        return {
            f"{stage}/{name}": tensor
            for stage in _STAGES
            for name, tensor in load_file(out / stage / "student.safetensors").items()
        }
