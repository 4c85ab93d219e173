"""ComfyUI in this process, tiny files for it, and a ComfyUI server."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.keys import dense_shapes
from d2m_model.layout import inverse_order, neuron_axis, permute_neurons
from demo.in_process import Comfy
from demo.server import ComfyServer
from tests.comfyui.grouped import grouped, loaded, watched  # noqa: F401 (fixtures)
from tests.comfyui.serving import write_base
from tests.toys import files

BLOCKS = ("double_blocks.", "single_blocks.")
LINEARS = {  # weights of the blocks
    name: shape for name, shape in dense_shapes(files.DIMS).items() if name.startswith(BLOCKS) and len(shape) == 2
}


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Comfy:
    host = Comfy(tmp_path_factory.mktemp("comfyui"))
    host.load_pack()
    gc.freeze()  # as in tests/conftest.py
    return host


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI with all models of serving.py. Files that use it are in one process (SERVER in tests/conftest.py)."""
    base = tmp_path_factory.mktemp("server")
    write_base(base)
    with ComfyServer(base) as running:
        (base / "startup.log").write_text(running.log.read_text())
        yield running


@pytest.fixture(scope="session")
def startup_log(server: ComfyServer) -> str:
    """Output of the server before the first request."""
    return (server.base / "startup.log").read_text()


@dataclass
class Pair:
    """A dense teacher and the FLUX-MoE that it was split into: their tensors, files and MODELs."""

    dense: dict[str, Tensor]
    split: dict[str, Tensor]
    dense_file: Path
    moe_file: Path
    teacher: Any
    moe: Any


@pytest.fixture(scope="session")
def pair(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    dense = files.dense_flux()
    split = files.split(dense)
    dense_file = files.save(dense, folder / "dense.safetensors")
    moe_file = files.save(split, folder / "moe.safetensors")
    return Pair(dense, split, dense_file, moe_file, host.load(dense_file), host.load(moe_file))


def lora_for(model: Any, seed: int = 1, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA on every linear layer of the blocks, named as kohya's tools name them."""
    generator, lora = torch.Generator().manual_seed(seed), {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if not name.startswith(BLOCKS) or weight.ndim != 2 or "router" in name or ".capacity." in name:
            continue
        out, width = weight.shape
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        lora[f"{key}.lora_down.weight"] = torch.randn(rank, width, generator=generator) * width**-0.5
        lora[f"{key}.lora_up.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    return lora


def with_lora(model: Any, strength: float = 0.8, seed: int = 1, rank: int = 4) -> Any:
    """A clone with `lora_for` this model."""
    import comfy.sd

    lora = lora_for(model, seed, rank)
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def in_teachers_order(tensors: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `dense` has too, with their neurons in its order."""
    found = {name: tensors[name] for name in dense}
    for order_name in (name for name in tensors if name.endswith(".neuron_order")):
        ffn = order_name.removesuffix(".neuron_order")
        for name in found:
            if (place := neuron_axis(name, ffn, files.DIMS.hidden_size)) is not None:
                found[name] = permute_neurons(found[name], *place, inverse_order(tensors[order_name]))
    return found


@pytest.fixture
def without_pack(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's loaders as they are without this pack."""
    import comfy.supported_models as supported

    stock = [entry for entry in supported.models if not entry.__module__.startswith(host.pack_name)]
    assert len(stock) == len(supported.models) - 3
    monkeypatch.setattr(supported, "models", stock)


@pytest.fixture
def store(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty store of traces, in use by this pack's nodes."""
    module = host.module("nodes.expert_map.trace_store")
    found = module.TraceStore()
    for name in ("trace_node", "map_node", "routes"):
        monkeypatch.setattr(host.module(f"nodes.expert_map.{name}"), "STORE", found)
    return found
