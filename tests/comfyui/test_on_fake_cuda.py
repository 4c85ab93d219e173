"""A FLUX-MoE in ComfyUI on a GPU, without one: tensors without values on the device "cuda"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from d2m_model.routers import CapacityRouter
from d2m_model.trace import RoutingRecorder, pack
from demo.in_process import CONTEXT_TOKENS, Comfy
from tests.comfyui.grouped import DIMS, GROUPS
from tests.toys import files
from tests.toys.fake_gpu import GPU, HOST_WAITS, HostWaits

BLOCKS, PREDICTED = ("d2m_model/mob.py", "item"), ("d2m_model/routers/capacity_routing.py", "nonzero")


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
        # All weights offloaded: ComfyUI brings each of them in as it is used.
        without_values(model, weights_on=torch.device("cpu"), buffers_on=torch.device("cpu"))
        for module in model.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = True
        with HostWaits():
            assert evaluate(model, **settings).device == GPU
