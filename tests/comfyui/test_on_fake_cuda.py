"""A FLUX-MoE in ComfyUI on a GPU, without one: tensors without values on the device "cuda"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2m_model.routers import CapacityRouter
from d2m_model.trace import RoutingRecorder, pack
from demo.in_process import CONTEXT_TOKENS, Comfy
from tests.comfyui.conftest import LINEARS, Pair
from tests.comfyui.grouped import DIMS, GROUPS
from tests.comfyui.test_saving import load
from tests.toys import files
from tests.toys.fake_gpu import GPU, HOST_WAITS, HostWaits

BLOCKS, PREDICTED = ("d2m_model/mob.py", "item"), ("d2m_model/routers/capacity_routing.py", "event")


def without_values(module: nn.Module, *, weights_on: torch.device, buffers_on: torch.device) -> None:
    """Replace all tensors of a model by tensors without values."""
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=weights_on)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(empty, requires_grad=False))
    for name, buffer in list(module.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(
            module.get_submodule(owner), attribute, torch.empty(buffer.shape, dtype=buffer.dtype, device=buffers_on)
        )


def evaluate(model: Any, batch: int = 2, **settings: Any) -> Tensor:
    params = model.diffusion_model.params
    output: Tensor = model.apply_model(
        torch.empty(batch, 16, 16, 16, device=GPU),
        torch.empty(batch, device=GPU),
        c_crossattn=torch.empty(batch, CONTEXT_TOKENS, params.context_in_dim, device=GPU),
        y=torch.empty(batch, params.vec_in_dim, device=GPU),
        guidance=torch.empty(batch, device=GPU),
        transformer_options={"d2m": settings},
    )
    return output


@pytest.mark.parametrize("capacity", [None, CapacityRouter(capacity=2.0, width=16)], ids=["top-k", "capacity"])
def test_the_host_waits_for_what_is_listed_only(host: Comfy, tmp_path: Path, capacity: CapacityRouter | None) -> None:
    """Under a mask and with a trace, after partial loading, which leaves buffers on the host."""
    router: dict[str, Any] = {} if capacity is None else {"capacity": capacity}
    split = files.split(files.dense_flux(DIMS), DIMS, groups=GROUPS, mean=True, **router)
    model = host.load(files.save(split, tmp_path / "moe.safetensors")).model
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        without_values(model, weights_on=GPU, buffers_on=torch.device("cpu"))
        layouts = model.diffusion_model.config.ffns
        mask = {ffn: torch.ones(layout.experts, device=GPU) for ffn, layout in layouts.items()}
        recorder = RoutingRecorder()
        settings = {"mask_on_device": mask, "gate": "normalised", "trace": recorder}
        with HostWaits() as first:
            evaluate(model, **settings)
        with HostWaits() as later:
            output = evaluate(model, **settings)
            pack([recorder], torch.empty(1, device=GPU))
        assert output.device == GPU
        assert first.waits - later.waits == {("nodes/model/blocks.py", "copy")}  # of the buffers, once
        assert later.waits == ({BLOCKS} if capacity is None else {BLOCKS, PREDICTED})
        assert later.waits <= set(HOST_WAITS)
        assert later.idle_waits() == 0
        # All weights offloaded: ComfyUI brings each of them in as it is used.
        without_values(model, weights_on=torch.device("cpu"), buffers_on=torch.device("cpu"))
        for module in model.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = True
        with HostWaits():
            assert evaluate(model, **settings).device == GPU


class Widened(TorchDispatchMode):
    """Records the shapes of float8 tensors that are converted to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.dtype == torch.float8_e4m3fn != result.dtype:
                self.shapes.add(tuple(source.shape))
        return result


@pytest.mark.parametrize("top_k", [1, files.LAYOUT.experts])
def test_of_a_routed_weight_stored_in_float8_the_shared_part_alone_is_converted(
    host: Comfy, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int
) -> None:
    """A converted copy of the experts' part would cost more traffic than their products' operands."""
    stored, file = files.split(pair.dense, dense_double_blocks=0), tmp_path / "moe.safetensors"
    save_file(stored | {name: stored[name].to(torch.float8_e4m3fn) for name in LINEARS}, file)
    model = load(host, file).model
    for module in ("d2m_model.experts", "nodes.model.blocks"):
        monkeypatch.setattr(host.module(module), "has_kernels", lambda x: True)
    hidden_size, layout = files.DIMS.hidden_size, files.LAYOUT
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        without_values(model, weights_on=GPU, buffers_on=GPU)
        with Widened() as widened:
            evaluate(model, top_k=top_k)
    routed = {
        (layout.shared, hidden_size),  # double blocks
        (hidden_size, layout.shared),
        (3 * hidden_size + layout.shared, hidden_size),  # single blocks
        (hidden_size, hidden_size + layout.shared),
    }
    ffns = (".img_mlp.", ".txt_mlp.", ".linear1.", ".linear2.")
    others = {shape for name, shape in LINEARS.items() if not any(part in name for part in ffns)}
    assert widened.shapes == routed | others
