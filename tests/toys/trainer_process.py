"""The trainer's command line in processes that are forked from one that has imported everything.

A process started anew spends seven seconds of CPU on importing torch and diffusers, more than a toy run takes.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
LONGEST = 400.0  # seconds: the longest run takes 30 on an idle machine

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "d2m_train.commands.distill",
        "d2m_model.hosts.diffusers",
        "diffusers.models.transformers.transformer_flux",
        "accelerate",
        "torch.utils.tensorboard",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "diffusers.optimization",
        "deepspeed",  # on Linux
    ]
)


@dataclass(frozen=True)
class Result:
    """Exit status (that of a failed rank, if any) and everything that all ranks printed."""

    returncode: int
    output: str

    def succeed(self) -> str:
        """Return the output; fail with its end if the exit status is not 0."""
        assert self.returncode == 0, self.output[-5000:]
        return self.output


class Run:
    """A running `python -m d2m_train …`, of one process or several ranks."""

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int = 1,
        env: dict[str, str] | None = None,
        largest_file: int | None = None,
    ) -> None:
        """`env` is added to the environment; a file of more than `largest_file` bytes cannot be written."""
        with tempfile.NamedTemporaryFile(delete=False) as output:
            self._output = Path(output.name)
        port = _free_port()
        # A ComfyUI on the path, as tests in the same worker leave it, has a package `tests` of its own.
        path = [str(ROOT), *(entry for entry in sys.path if not (Path(entry) / "comfy").is_dir())]
        with (
            mock.patch.dict(os.environ, {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}),  # of the process that is forked
            mock.patch.object(sys, "path", path),
        ):
            self._ranks = [
                _FORKS.Process(
                    target=_run,
                    args=(list(arguments), _rank(rank, ranks, port) | (env or {}), self._output, largest_file),
                    daemon=True,
                )
                for rank in range(ranks)
            ]
            for process in self._ranks:
                process.start()

    def poll(self) -> int | None:
        """Return the exit status once a rank has failed or all have ended, else None."""
        return _status([process.exitcode for process in self._ranks])

    def send_signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send it to one rank, or to all."""
        for process in self._ranks if rank is None else [self._ranks[rank]]:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    def wait(self, without: int | None = None) -> Result:
        """Wait for the end. Where one rank fails, the others are stopped, as torchrun does; rank `without` may fail.

        A run that hangs fails the test, which prints where every thread of every rank stands.
        """
        ranks = [process for rank, process in enumerate(self._ranks) if rank != without]
        end = time.monotonic() + LONGEST
        while (code := _status(codes := [process.exitcode for process in ranks])) is None:
            # Of the same look at all ranks: one that ends meanwhile would leave nothing to wait for.
            running = [process.sentinel for process, ended in zip(ranks, codes, strict=True) if ended is None]
            if not connection.wait(running, timeout=end - time.monotonic()):
                raise AssertionError(f"The run has not ended after {LONGEST:.0f} s:\n{self._stacks()}")
        self.send_signal(signal.SIGKILL)
        for process in self._ranks:
            process.join()
        output = self._output.read_text(errors="replace")
        self._output.unlink()
        return Result(code, output)

    def _stacks(self) -> str:
        """Stop the run. Return what it printed, with the stacks of all threads of one rank after another."""
        for process in self._ranks:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(2)  # for its stacks to be written, unmixed with the next rank's
        self.send_signal(signal.SIGKILL)
        return self._output.read_text(errors="replace")


def _status(codes: Sequence[int | None]) -> int | None:
    """Exit status of a run with these of its ranks (None: still running); None while it runs."""
    return next((code for code in codes if code), None) or (0 if None not in codes else None)


def _rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Environment that torchrun gives to a rank; none to a single process."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(arguments: list[str], env: dict[str, str], output: Path, largest_file: int | None) -> None:
    """Run the command in this process, with its output appended to `output`."""
    from d2m_train.__main__ import main

    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGUSR1)
    gc.freeze()  # the modules' objects, over which every collection would go again
    os.environ.update(env)
    os.chdir(ROOT)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(arguments))
