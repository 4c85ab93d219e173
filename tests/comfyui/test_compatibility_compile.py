"""torch.compile, as TorchCompileModel and other packs ask for it: one graph serves every setting.

Beyond torch's limit of recompilations (eight) a model runs uncompiled without a word; here that is an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2m_model import experts
from d2m_model.config import BlockGroup
from d2m_model.routers import CapacityRouter
from demo.in_process import Comfy
from tests.comfyui.conftest import LINEARS, Pair, with_lora
from tests.comfyui.grouped import evaluate, inputs
from tests.comfyui.test_quantised import quantise, write
from tests.comfyui.test_saving import load
from tests.toys import files
from tests.toys.compare import distance

ALL = files.LAYOUT.experts
DIMS = replace(files.DIMS, double_blocks=1, single_blocks=1)  # quick to trace
SMALL = (1, 8, 8)


pytestmark = pytest.mark.usefixtures("counters")


def compiled(model: Any) -> Any:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    return TorchCompileModel.execute(model, "eager").result[0]  # its own backends need a C++ compiler


def blocks_compiled(model: Any) -> Any:
    """Block by block, as other packs do, with the guards of TorchCompileModel."""
    from comfy.patcher_extension import WrappersMP
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, apply_torch_compile_factory
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    clone, flux = model.clone(), model.model.diffusion_model
    blocks = [(kind, i) for kind in ("double_blocks", "single_blocks") for i in range(len(getattr(flux, kind)))]
    graphs = {
        f"diffusion_model.{kind}.{i}": torch.compile(
            getattr(flux, kind)[i],
            backend="eager",
            options={"guard_filter_fn": skip_torch_compile_dict},  # torch.compile takes it out of the dict
        )
        for kind, i in blocks
    }
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, apply_torch_compile_factory(graphs))
    return clone


def agree(host: Comfy, eager: Any, other: Any, size: tuple[int, int, int] = SMALL, **settings: Any) -> Any:
    with_settings = host.with_settings
    models = [with_settings(model, **settings) if settings else model for model in (eager, other)]
    expected, found = (host.sample(model, size, steps=1) for model in models)
    assert distance(found, expected) <= 1e-6
    return expected


def masks(model: Any) -> list[dict[str, Any]]:
    """Return masks of no FFN, of one, and of all."""
    names = list(model.model.diffusion_model.config.ffns)
    weights = torch.linspace(0, 2, ALL)
    return [{}, {names[0]: weights}, {name: weights.flip(0) for name in names}]


@pytest.mark.parametrize("by", [compiled, blocks_compiled], ids=["the model", "block by block"])
def test_top_k_gate_and_mask_are_the_same_graph(
    host: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counters: Any, by: Callable[[Any], Any]
) -> None:
    """Every Top-K, in an order that torch does not like, also where experts are computed in several chunks."""
    monkeypatch.setattr(experts, "CHUNK_BYTES_CPU", 16 << 10)
    split = files.split(files.dense_flux(DIMS), DIMS, mean=True, dense_double_blocks=0)
    moe = host.load(files.save(split, tmp_path / "moe.safetensors"))
    whole, seen = by(moe), {}
    agree(host, moe, whole, top_k=2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (1 if by is compiled else 2)
    for gate in ("sum", "normalised"):
        for top_k in (3, 0, 1, ALL, *range(2, ALL)):
            seen[gate, top_k] = agree(host, moe, whole, top_k=top_k, gate=gate)
    for index, mask in enumerate(masks(moe)[1:]):
        seen["mask", index] = agree(host, moe, whole, mask=mask, top_k=5)
    by_ffn = {name: place for place, name in enumerate(moe.model.moe_config.ffns)}
    seen["by FFN", 0] = agree(host, moe, whole, top_k_by_ffn=by_ffn)
    agree(host, moe, whole)  # what the file says
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    few = [it for (gate, top_k), it in seen.items() if gate != "normalised" or 0 < top_k < 5]
    assert min(distance(a, b) for i, a in enumerate(few) for b in few[:i]) >= 1e-4  # settings do something


@pytest.mark.parametrize("by", [compiled, blocks_compiled], ids=["the model", "block by block"])
def test_blocks_that_are_called_without_options_are_the_same_graph(
    host: Comfy, tmp_path: Path, counters: Any, by: Callable[[Any], Any]
) -> None:
    """The loop over the blocks is another pack's."""
    packs = importlib.import_module("tests.comfyui.packs")  # which imports ComfyUI
    split = files.split(files.dense_flux(DIMS), DIMS, dense_double_blocks=0)
    moe = host.load(files.save(split, tmp_path / "moe.safetensors"))
    whole = by(packs.loop_of_an_object_patch(moe))
    for top_k in (2, 0, 1, 5, ALL):
        agree(host, moe, whole, top_k=top_k)
    agree(host, moe, whole, top_k=5, gate="normalised", mask=masks(moe)[1])
    agree(host, moe, whole, top_k_by_ffn={name: place for place, name in enumerate(moe.model.moe_config.ffns)})
    agree(host, moe, whole)
    assert counters["stats"]["unique_graphs"] == (1 if by is compiled else 2)
    assert not counters["graph_break"]


def test_capacity_is_the_same_graph(host: Comfy, tmp_path: Path, counters: Any) -> None:
    """However many experts the tokens then have."""
    capacity = CapacityRouter(capacity=2.0, width=16)
    split = files.split(files.dense_flux(DIMS), DIMS, mean=True, dense_double_blocks=0, capacity=capacity)
    moe = host.load(files.save(split, tmp_path / "moe.safetensors"))
    whole = compiled(moe)
    for factor in (1, 0, 0.25, 0.5, 1.0, 1.5, 2.0, 3, 4, 8.0, 1e9):
        for gate in ("sum", "normalised"):
            agree(host, moe, whole, capacity=factor, gate=gate)
    for mask in masks(moe):
        agree(host, moe, whole, mask=mask)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_other_sizes_and_batches_are_one_more_graph(host: Comfy, tmp_path: Path, counters: Any) -> None:
    """As of a dense FLUX: one for the first size, one for all others."""
    split = files.split(files.dense_flux(DIMS), DIMS, dense_double_blocks=0)
    moe = host.load(files.save(split, tmp_path / "moe.safetensors"))
    whole = compiled(moe)
    for size, top_k in ((SMALL, 2), ((4, 16, 8), ALL)):
        agree(host, moe, whole, size, top_k=top_k)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_dense_flux_does_not_use_up_the_graphs_of_a_flux_moe(host: Comfy) -> None:
    """torch counts them by code object."""
    from comfy.ldm.flux.model import Flux

    assert host.module("nodes.model.flux_moe").FluxMoE.forward.__code__ is not Flux.forward.__code__


@pytest.mark.parametrize("by", [compiled, blocks_compiled], ids=["the model", "block by block"])
def test_block_groups_make_no_more_graphs_than_their_samples(
    host: Comfy, tmp_path: Path, counters: Any, by: Callable[[Any], Any]
) -> None:
    """0 … m active blocks of both kinds under every Top-K: only how many samples run a block is new to a graph."""
    dims = replace(files.DIMS, double_blocks=3, single_blocks=3)
    groups = tuple(
        BlockGroup(kind=kind, first=0, blocks=3, active=1, selection="topk")
        for kind in ("double", "single")  # type: ignore[arg-type]
    )
    tensors = files.split(files.dense_flux(dims), dims, groups=groups, dense_double_blocks=0)
    moe = host.load(files.save(tensors, tmp_path / "moe.safetensors"))
    whole = by(moe)
    for size in (SMALL, (4, 8, 8)):
        for active in range(4):
            agree(host, moe, whole, size, active_blocks=active)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    for size in (SMALL, (4, 8, 8)):
        for active in (0, 1, 2, 3, [1, 2]):
            for top_k in (0, 7):
                agree(host, moe, whole, size, active_blocks=active, top_k=top_k)
        agree(host, moe, whole, size, gate="normalised")
        for mask in masks(moe):
            agree(host, moe, whole, size, mask=mask)
    # A block that two or three of four samples run may be new: the choice varies with Top-K.
    assert counters["stats"]["unique_graphs"] <= graphs + 2
    assert sum(counters["graph_break"].values()) == breaks


class Listening:
    """A trace of what routers choose; see d2m_model/trace.py."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def experts(self, ffn: str, routing: Any, **rest: Any) -> None:
        self.heard.append((ffn, routing.experts_TK.shape[1]))


def test_every_run_of_a_compiled_model_has_its_own_trace(host: Comfy, tmp_path: Path, counters: Any) -> None:
    """Traced runs are not compiled, and leave the graphs as they are."""
    split = files.split(files.dense_flux(DIMS), DIMS, dense_double_blocks=0)
    moe = host.load(files.save(split, tmp_path / "moe.safetensors"))
    for whole in (compiled(moe), blocks_compiled(moe)):
        expected = agree(host, moe, whole, top_k=2)
        graphs = counters["stats"]["unique_graphs"]
        for top_k in (2, 4):
            trace = Listening()
            traced = host.with_settings(whole, top_k=top_k, trace=trace)
            found = host.sample(traced, SMALL, steps=1)
            assert trace.heard == [(ffn, top_k) for ffn in moe.model.diffusion_model.config.ffns]
            assert (distance(found, expected) <= 1e-6) == (top_k == 2)
        assert distance(agree(host, moe, whole, top_k=2), expected) <= 1e-6
        assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_blocks_have_no_graph_breaks(host: Comfy, tmp_path: Path) -> None:
    split = files.split(files.dense_flux(DIMS), DIMS, dense_double_blocks=0)
    flux = host.load(files.save(split, tmp_path / "moe.safetensors")).model.diffusion_model
    x, vec = torch.randn(1, 40, 128), torch.randn(1, 128)
    common: dict[str, Any] = {"vec": vec, "pe": flux.pe_embedder(torch.zeros(1, 40, 3))}
    graph = host.module("nodes.model.settings").graph_settings(flux.config, {"top_k": 3}, x.device)
    single, double = flux.single_blocks[0], flux.double_blocks[0]
    for options in ({}, {"d2m_graph": graph}):  # without what FluxMoEModel adds, and with it
        common["transformer_options"] = {"d2m": {"top_k": 3}, **options}
        with torch.no_grad():
            run = torch.compile(single, fullgraph=True, backend="aot_eager")
            assert distance(run(x.clone(), **common), single(x.clone(), **common)) <= 1e-6
            img, txt = x[:, :30], x[:, 30:]
            run = torch.compile(double, fullgraph=True, backend="aot_eager")
            found, expected = (it(img=img.clone(), txt=txt.clone(), **common) for it in (run, double))
            assert distance(torch.cat(found, 1), torch.cat(expected, 1)) <= 1e-6


def test_gradients_flow_through_compiled_experts(host: Comfy, tmp_path: Path) -> None:
    """ComfyUI's own LoRA training needs these gradients."""
    split = files.split(files.dense_flux(DIMS), DIMS, dense_double_blocks=0)
    flux = host.load(files.save(split, tmp_path / "moe.safetensors")).model.diffusion_model
    mlp = flux.double_blocks[0].img_mlp
    graph = host.module("nodes.model.settings").graph_settings(flux.config, {"top_k": 3}, torch.device("cpu"))
    options = {"d2m": {"top_k": 3}, "d2m_graph": graph}
    x, gradients = torch.randn(1, 40, 128), []

    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp(x, mlp.file.under(options))

    for run in (forward, torch.compile(forward, backend="aot_eager"), mlp):
        given = x.clone().requires_grad_()
        run(given).square().sum().backward()
        gradients.append(given.grad)
    assert distance(gradients[1], gradients[0]) <= 1e-5
    assert distance(gradients[1], gradients[2]) >= 1e-3  # the file's own Top-K


def files_config(tensors: dict[str, Any]) -> Any:
    from d2m_model.checkpoint import check_state_dict

    return check_state_dict(tensors)


def test_a_file_of_groups_alone_compiles(host: Comfy, tmp_path: Path) -> None:
    """Without experts there is nothing for a graph to be told."""
    dims = replace(files.DIMS, double_blocks=3, single_blocks=1)
    group = BlockGroup(kind="double", first=0, blocks=3, active=1, selection="topk")
    split = files.split(files.dense_flux(dims), dims, groups=(group,), dense_double_blocks=3)
    config = replace(files_config(split), ffns={})
    dense = {**files.dense_flux(dims), **{name: it for name, it in split.items() if "block_groups" in name}}
    dense["d2m_config"] = files.config_tensor(config.to_json())
    moe = host.load(files.save(dense, tmp_path / "groups.safetensors"))
    whole = compiled(moe)
    for active in range(4):
        agree(host, moe, whole, active_blocks=active)
    batch = inputs(4)
    assert evaluate(moe, *batch).shape == batch[0].shape


def test_a_quantised_file_with_a_lora_compiles(host: Comfy, pair: Pair, tmp_path: Path, counters: Any) -> None:
    file = write("float8_e4m3fn", quantise(pair.split, "float8_e4m3fn")[0], tmp_path / "moe.safetensors")
    moe = with_lora(host.load(file))
    whole = compiled(moe)
    for top_k in (2, 0, ALL):
        agree(host, moe, whole, top_k=top_k)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_graph_hands_experts_stored_in_float8_on_as_they_are(
    host: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counters: Any
) -> None:
    """As on a GPU. The operators in the graph convert them where no kernels take float8."""
    split = files.split(files.dense_flux(DIMS), DIMS, dense_double_blocks=0)
    stored = {name: split[name].to(torch.float8_e4m3fn) for name in LINEARS if name in split}
    save_file(split | stored, tmp_path / "moe.safetensors")
    moe = load(host, tmp_path / "moe.safetensors")
    operators, taken = host.module("nodes.model.custom_operators"), []
    as_taken = operators._as_taken
    monkeypatch.setattr(host.module("nodes.model.blocks"), "_float8_in_graph", lambda linear, x: True)
    monkeypatch.setattr(
        operators, "_as_taken", lambda weight, *rest: taken.append(weight.dtype) or as_taken(weight, *rest)
    )
    whole = compiled(moe)
    for top_k in (2, 0, ALL):
        agree(host, moe, whole, top_k=top_k)
    assert set(taken) == {torch.float8_e4m3fn}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
