"""Tensors without values on the device "cuda": what a GPU would hold and wait for, on a machine without one.

FakeTensorMode gives them devices, dtypes and shapes. Modes on top of it count memory and the host's waits.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda:1")  # not the current device, so that a tensor made without its device is an error
BLOCK = 512  # bytes: the unit of torch's allocator
ROOT = Path(__file__).resolve().parents[2]
CODE = ("d2m_model", "d2m_train", "nodes")

# Every operator for which the host waits while a FLUX-MoE runs or is trained, by file and name, with the reason.
HOST_WAITS = {
    ("d2m_model/mob.py", "item"): (
        "The host must know which blocks no sample runs, to skip them. A group's choice depends on the blocks before it, so "
        "this is one wait for each group. There is none if all blocks of the group run, or none of them."
    ),
    ("d2m_model/routers/capacity_routing.py", "event"): (
        "Only the device knows how many experts the tokens of a capacity router have, and the host allocates their rows. "
        "Rows for every token at every expert would need E / K times the memory. The host waits after it has given the "
        "device the shared expert's product, so that the device has work meanwhile."
    ),
    ("d2m_model/experts.py", "item"): (
        "Tokens with unlike numbers of experts, in several chunks, in training: the host must know at which rows the chunks "
        "begin. At inference a capacity router has told it."
    ),
    ("d2m_model/kernels/grouped_mm.py", "item"): (
        "A product where neither the Triton kernels nor torch's fused grouped product run: its loop goes by experts."
    ),
    ("nodes/controls/evaluation_settings.py", "item"): (
        "Schedules, live values and logs go by sigma, which samplers keep on the device: one wait for each evaluation."
    ),
    ("d2m_train/training/loop.py", "item"): (
        "Losses and gradients that are not finite, and a request to stop, read together once an optimizer step: a step with "
        "such values must not change the weights. So the host is at most a step ahead of the device."
    ),
    ("d2m_train/monitor/stage_log.py", "item"): "The means of an interval, read together every eyes.log_every steps.",
}


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the GPU's tensors that are made under this mode: those alive `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._add((args, kwargs), made=False)
        result = func(*args, **kwargs)
        self._add(result, made=True)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, values: Any, *, made: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.is_cuda and value.untyped_storage()._cdata not in self.sizes:
                storage = value.untyped_storage()
                size = -(-storage.nbytes() // BLOCK) * BLOCK if made else 0
                self.sizes[storage._cdata] = size
                self.now += size
                weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class HostWaits(TorchDispatchMode):
    """Records the operators for which the host waits, as (file, name): the last of this project's files that called it.

    The name of a wait for an event is "event". `log` has the waits, the starts of copies that are waited for later, and
    matrix products ("product"), in order. Values that the host reads are 1, and half of the entries are not zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: set[tuple[str, str]] = set()
        self.log: list[str] = []
        self._streams = ExitStack()

    def __enter__(self) -> HostWaits:
        recorder = self

        class Event:
            def __init__(self, device: torch.device) -> None: ...

            def record(self, stream: object) -> None:
                recorder.log.append("copy started")

            def synchronize(self) -> None:
                recorder._wait("event", True)

        self._streams.enter_context(mock.patch.object(torch, "Event", Event))
        self._streams.enter_context(mock.patch.object(torch.cuda, "current_stream", return_value=None))
        return super().__enter__()  # type: ignore[no-any-return]

    def idle_waits(self) -> int:
        """Count the copies for which the host waits without having given the device a product meanwhile."""
        starts = [index for index, entry in enumerate(self.log) if entry == "copy started"]
        return sum("product" not in self.log[start : self.log.index("event", start)] for start in starts)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._streams.close()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is aten._local_scalar_dense.default:
            self._wait("item", args[0].is_cuda)
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:
            self._wait("nonzero", args[0].is_cuda)
            return args[0].new_empty(args[0].numel() // 2, args[0].dim(), dtype=torch.int64)
        result = func(*args, **kwargs)
        if func in (aten.mm.default, aten.addmm.default):
            self.log.append("product")
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            # A copy to the host is made in pinned memory if it need not block; one from the host is mostly not.
            pinned = kwargs.get("non_blocking", False) and result.device.type == "cpu"
            self._wait("copy", source.device.type != result.device.type and not pinned)
        return result

    def _wait(self, name: str, waits: bool) -> None:
        frame = sys._getframe(2)
        while waits and frame is not None:
            path = Path(frame.f_code.co_filename)
            named = path.is_relative_to(ROOT) and path.name != "host_copy.py"  # what asked for the copy is named
            if named and (file := path.relative_to(ROOT)).parts[0] in CODE:
                self.waits.add((str(file), name))
                self.log.append(name)
                return
            frame = frame.f_back  # type: ignore[assignment]
        if waits:
            self.waits.add(("elsewhere", name))
