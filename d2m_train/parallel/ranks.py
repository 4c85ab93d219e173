"""The processes of a run, by accelerate: sharing the model, gradients, reductions over ranks, and signals to stop.

accelerate's configuration (`accelerate launch`) says how many processes there are and how they share the model (DDP,
FSDP2, DeepSpeed ZeRO); without one there is a single process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from d2m_model.blocks import blocks_of

from .. import UserError
from ..run_config import RunConfig
from .deepspeed import configuration, deepspeed_requested, without_accelerates_deepspeed
from .parameters import full_tensor, shard_axis
from .student_state import StudentState, TorchState
from .watch import RankWatch
from .zero import Zero


@dataclass(kw_only=True, slots=True)
class PreparedStudent:
    """A student and its optimizer, wrapped for the processes of a run."""

    called: Any  # runs a forward pass; its backward pass reaches all ranks
    core: Any  # the model itself, in no wrapper; FSDP2 shards it in place
    optimizer: Any
    state: StudentState


# The other ranks wait while the main one converts or encodes, which takes hours for a 12 B model. A rank that does not work at
# all is watch.py's matter.
_TIMEOUT = timedelta(hours=12)
_LOST = ("gloo/transport", "ncclRemoteError")  # in the error of a collective whose other side has ended

_ONE_STOP = 5  # seconds within which launcher and scheduler send the same signal, each of them


class Ranks:
    """This process as one of the run's ranks, from `with` to its end. All methods are called on every rank alike."""

    def __init__(self, run: RunConfig) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin

        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
        if self.sharded and (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise UserError(f"accelerate's configuration asks for FSDP {version}; expected fsdp_version: 2.")
        if self.sharded and run.training.mixed_precision == "fp16":
            raise UserError("training.mixed_precision is fp16, which FSDP2 does not support here; expected bf16 or no.")
        if self.sharded and run.student.dtype != "float32":
            raise UserError(
                f"student.dtype is {run.student.dtype}; expected float32 with FSDP2, which needs one dtype of all that a block "
                "trains, and routers and U are float32. student.frozen_dtype=bfloat16 halves the weights that are not trained."
            )
        if run.training.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise UserError(
                "training.mixed_precision is fp16, which needs a GPU, and there is none; expected bf16 or no."
            )
        self.zero_config = configuration(run) if deepspeed_requested() else None
        self.zero: Zero | None = None  # the engine of the stage that is being trained
        with without_accelerates_deepspeed():
            self.accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),
                mixed_precision=run.training.mixed_precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=run.training.accumulation,
                    # Otherwise every GPU would hold unsharded gradients until the last microbatch.
                    sync_each_batch=self.sharded or self.zero_config is not None,
                ),
                kwargs_handlers=[
                    InitProcessGroupKwargs(timeout=_TIMEOUT),
                    # The cache would keep a copy of every trained weight beyond its block, even when sharded.
                    AutocastKwargs(cache_enabled=False),
                ],
            )
        self.count: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        self._stop_asked = threading.Event()
        self.stop_signal: int = signal.SIGTERM  # that this rank got, if it got one
        self._watch = RankWatch(self.rank, self.count, self.wait) if self.count > 1 else None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the process group. Raises UserError in place of a collective's error where another rank has ended."""
        if self._watch is None:
            return
        if error is None:
            self.wait()  # the store that the watch reads ends with its process
        self._watch.close(failed=error is not None)
        self.accelerator.end_training()
        if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST):
            raise UserError(
                f"Process {self.rank} has lost the connection to another one, which was killed or ended by an error. "
                "The run goes on from its last checkpoint with resume=latest."
            ) from error

    @property
    def strategy(self) -> str:
        """`single`, `ddp`, `fsdp2`, `zero2` or `zero3`."""
        if self.sharded:
            return "fsdp2"
        if self.zero_config is not None:
            return f"zero{self.zero_config['zero_optimization']['stage']}"
        return "single" if self.count == 1 else "ddp"

    def say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    # The model

    def shard(self, model: nn.Module) -> None:
        """Shard the model under FSDP2, in place: a unit per block, and one for the rest.

        Called while the model is on the meta device and has no optimizer, so that no rank ever holds all weights.

        It uses torch's fully_shard itself, since accelerate has no FSDP on a CPU: so a CPU runs what a GPU runs. Mixed
        precision is autocast's, which leaves routers and U as they are; gradients are reduced in float32.
        """
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import Shard

        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.count,)),
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            "shard_placement_fn": lambda parameter: Shard(shard_axis(parameter.shape, self.count)),
        }
        reshard_after_forward = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in (
            "true",
            "1",
            "full_shard",
        )
        for block in blocks_of(model).values():
            fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
        fully_shard(model, **options)
        if self.accelerator.mixed_precision != "no":
            model.forward = self._autocast(model.forward)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> PreparedStudent:
        """Wrap a model, after `shard`, and its optimizer for the processes of the run."""
        if self.zero_config is not None:
            if self.accelerator.mixed_precision != "no":
                model.forward = self._autocast(model.forward)
            self.zero = Zero(model, optimizer, self.zero_config)
            return PreparedStudent(called=self.zero.engine, core=model, optimizer=self.zero, state=self.zero)
        called: Any = model
        wrapped: Any = optimizer
        if not self.sharded:
            called, wrapped = self.accelerator.prepare(model, optimizer)
        state = TorchState(model=called, optimizer=optimizer)
        return PreparedStudent(called=called, core=model, optimizer=wrapped, state=state)

    def _autocast(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def cast(*arguments: Any, **keywords: Any) -> Any:
            with self.accelerator.autocast():
                return forward(*arguments, **keywords)

        return cast

    def reshard(self, model: nn.Module) -> None:
        """Free gathered weights: after a pass without gradients a sharded model keeps some, which would hide later changes."""
        if self.zero is not None:
            self.zero.release_gathered()
        for module in model.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()

    def accumulate(self, model: nn.Module) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.accelerator.accumulate(model)
        return context

    def backward(self, loss: Tensor) -> None:
        if self.zero is not None:
            self.zero.backward(loss, last=self.synchronising)
        else:
            self.accelerator.backward(loss)

    @property
    def synchronising(self) -> bool:
        """True for the last microbatch of a step."""
        return bool(self.accelerator.sync_gradients)

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16, which skips steps with infinite gradients by itself; None otherwise."""
        return self.accelerator.scaler

    def clip(self, parameters: Sequence[nn.Parameter], maximum: float | None) -> Tensor:
        """Scale the gradients to at most this norm, and return the norm that they had, on the device.

        DeepSpeed scales them in its step.
        """
        if self.zero is not None:
            return self.zero.gradient_norm()
        clip = nn.utils.clip_grad_norm_ if self.sharded else self.accelerator.clip_grad_norm_
        return full_tensor(clip(parameters, float("inf") if maximum is None else maximum))

    def release(self) -> None:
        """Free what `prepare` has wrapped."""
        if self.zero is not None:
            self.zero.close()
            self.zero = None
        self.accelerator.free_memory()

    # Between ranks

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean over ranks."""
        if self.count == 1:
            return tensor
        mean: Tensor = self.accelerator.reduce(tensor.detach(), reduction="mean")
        return mean

    def averages(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means over ranks of named scalars, in one exchange."""
        if self.count == 1:
            return dict(values)
        together = self.average(torch.stack([value.detach().float() for value in values.values()]))
        return dict(zip(values, together.unbind(), strict=True))

    def main_value(self, value: int) -> int:
        """Return the main rank's value: other ranks may not yet see a file that it sees."""
        from accelerate.utils import broadcast_object_list

        number: int = broadcast_object_list([value])[0]
        return number

    def any(self, mine: bool) -> bool:
        """Return whether `mine` is true on any rank."""
        if self.count == 1:
            return mine
        return bool(self.average(torch.tensor(float(mine), device=self.device)) > 0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the `with` on the main rank first; the other ranks follow and find what it has written."""
        with self.accelerator.main_process_first():
            yield

    # Signals

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let SIGTERM, SIGHUP or a first Ctrl-C ask for a stop at the next step; a second one ends the process at once."""
        asked_at = 0.0

        def ask(number: int, frame: FrameType | None) -> None:
            nonlocal asked_at
            if self._stop_asked.is_set():
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                if time.monotonic() - asked_at > _ONE_STOP:
                    raise SystemExit(128 + number)
                return
            asked_at, self.stop_signal = time.monotonic(), number
            self._stop_asked.set()

        wanted = [signal.SIGTERM, signal.SIGINT]
        hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
        if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:  # ignored under nohup
            wanted.append(hang_up)
        before = {number: signal.signal(number, ask) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_asked(self) -> bool:
        """Return whether any rank has been asked to stop."""
        return self.any(self._stop_asked.is_set())

    def stop_request(self) -> Tensor:
        """Return 1 if this rank has been asked to stop, else 0: a scalar on the device, for an exchange with others."""
        return torch.full((), float(self._stop_asked.is_set()), device=self.device)
