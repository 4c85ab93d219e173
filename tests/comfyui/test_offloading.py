"""Memory as ComfyUI manages it: weights partly offloaded, taken off and on again, and a server that runs for long.

`--lowvram` does nothing on a CPU, so offloading is asked for as ComfyUI's memory management would ask.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2m_model.routers import CapacityRouter
from demo.in_process import Comfy
from demo.server import ApiGraph, ComfyServer
from tests.comfyui import grouped
from tests.comfyui.conftest import with_lora
from tests.comfyui.grouped import DEVICE, GROUPS
from tests.comfyui.serving import EMOJI, TINY_CONDITIONING, node
from tests.toys import files, gpu_programs

KINDS: dict[str, dict[str, Any]] = {
    "experts": {},
    "means": {"mean": True},
    "block groups": {"groups": GROUPS},
    "capacity routers": {"capacity": CapacityRouter(capacity=2.0, width=16)},
    "everything": {"mean": True, "groups": GROUPS, "capacity": CapacityRouter(capacity=2.0, width=16)},
}


@pytest.fixture(scope="module")
def of_kind(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    @functools.cache
    def made(kind: str) -> Any:
        split = files.split(files.dense_flux(grouped.DIMS), grouped.DIMS, **KINDS[kind])
        return host.load(files.save(split, tmp_path_factory.mktemp("kind") / "moe.safetensors"))

    return made


def offloaded(model: Any) -> int:
    """How many layers are cast as they are used."""
    return sum(bool(getattr(part, "comfy_cast_weights", False)) for part in model.model.diffusion_model.modules())


@pytest.mark.parametrize("lora", [False, True], ids=["as loaded", "with a LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_however_much_is_offloaded_the_bits_are_the_same(
    host: Comfy, of_kind: Callable[[str], Any], kind: str, lora: bool
) -> None:
    host.unload()
    moe = of_kind(kind).clone()
    moe = with_lora(moe) if lora else moe
    whole, counts, found = moe.model_size(), [], []
    for budget in (1, whole // 4, whole // 2, whole - (1 << 16), 1e32):
        moe.load(DEVICE, lowvram_model_memory=budget, full_load=budget > whole)
        counts.append(offloaded(moe))
        found.append(host.evaluate(moe))
        moe.detach()
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 4
    assert all(torch.equal(it, found[-1]) for it in found[:-1])


@pytest.mark.parametrize("lora", [False, True], ids=["as loaded", "with a LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_and_come_back_between_evaluations(
    host: Comfy, of_kind: Callable[[str], Any], kind: str, lora: bool
) -> None:
    """This happens when another model needs the memory. With a LoRA all weights come back at once: a dense FLUX with a
    LoRA, reloaded piece by piece, does not paint what it painted before either."""
    host.unload()
    moe = with_lora(of_kind(kind)) if lora else of_kind(kind).clone()
    moe.load(DEVICE, full_load=True)
    expected, whole = host.evaluate(moe), moe.model_size()
    for share in (0.1, 0.4, 0.4):
        moe.partially_unload(DEVICE, int(share * whole))
        assert torch.equal(host.evaluate(moe), expected)
    assert offloaded(moe)
    for memory in (1e32,) if lora else (whole // 3, whole // 3, 1e32):
        moe.partially_load(DEVICE, memory)
        assert torch.equal(host.evaluate(moe), expected)
    moe.detach()


@pytest.mark.parametrize("kind", ["experts", "everything"])
def test_settings_do_not_make_a_model_of_their_own(host: Comfy, of_kind: Callable[[str], Any], kind: str) -> None:
    """Clones of every setting, sampled in turn, are one loaded model; nothing is patched in or out between them."""
    import comfy.model_management

    host.unload()
    moe, with_settings = of_kind(kind), host.with_settings
    patches = moe.model.diffusion_model.single_blocks[0].linear1.weight.data_ptr()
    for k in range(13):
        settings = {"capacity": k / 4, "active_blocks": k % 4} if kind == "everything" else {"top_k": k}
        host.sample(with_settings(moe, **settings), (1, 8, 8), steps=1)
        assert len(comfy.model_management.current_loaded_models) == 1
        assert moe.model.diffusion_model.single_blocks[0].linear1.weight.data_ptr() == patches


class CastBuffers:
    """Stand-in for ComfyUI's casts of offloaded layers, on the CPU: one buffer for each of its offload streams.

    A buffer is overwritten by a later cast, and by NaN when its cast is given back.
    """

    def __init__(self, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
        import comfy.ops

        self.buffers, self.casts = [torch.empty(1 << 22, dtype=torch.uint8) for _ in range(streams)], 0
        self.cast_bias_weight = comfy.ops.cast_bias_weight
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", self.cast)
        monkeypatch.setattr(comfy.ops, "uncast_bias_weight", self.uncast)

    def cast(self, layer: Any, *args: Any, offloadable: bool = False, **kwargs: Any) -> Any:
        parts = self.cast_bias_weight(layer, *args, offloadable=True, **kwargs)[:2]
        if not offloadable:  # such casts are new tensors
            return parts
        buffer, first, recycled = self.buffers[self.casts % len(self.buffers)], 0, []
        self.casts += 1
        for part in parts:
            if part is not None:
                place = buffer[first : first + part.nbytes].view(part.dtype).view(part.shape)
                first += -(-part.nbytes // 64) * 64
                part = place.copy_(part)
            recycled.append(part)
        return (*recycled, buffer)

    def uncast(self, layer: Any, weight: Any, bias: Any, buffer: Any) -> None:
        if buffer is not None:
            buffer.fill_(255)  # NaN in every floating-point dtype


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("kind", ["experts", "everything"])
def test_no_cast_is_used_after_its_buffer_was_taken(
    host: Comfy, of_kind: Callable[[str], Any], kind: str, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.unload()
    moe = host.with_settings(of_kind(kind), gate="normalised")
    moe.load(DEVICE, full_load=True)
    expected = host.evaluate(moe)
    moe.detach()
    moe.load(DEVICE, lowvram_model_memory=1)
    buffers = CastBuffers(streams, monkeypatch)
    found = host.evaluate(moe)
    moe.detach()
    assert buffers.casts
    assert torch.equal(found, expected)


def test_comfyuis_own_streams_bring_in_routers_unharmed() -> None:
    gpu_programs.run(gpu_programs.offloaded_routers)


# A server that runs for long

# The end of a graph, which tells what the process holds.
HOLDS = """
import gc, json
from pathlib import Path
import torch
import comfy.model_management

gc.freeze()  # what is imported by now need not be gone through in every run

class Holds:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "tell", "testing", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "run": ("INT", {"default": 0})}}

    def tell(self, latent, run):
        gc.collect()
        storages = {}
        for it in gc.get_objects():
            if isinstance(it, torch.Tensor) and it.layout == torch.strided and it.device.type != "meta":
                storage = it.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        lines = Path("/proc/self/status").read_text().splitlines()
        anonymous = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
        told = {
            "models": len(comfy.model_management.current_loaded_models),
            "tensors": sum(storages.values()),
            "anonymous": anonymous,
            "mean": float(latent["samples"].mean()),
        }
        return {"ui": {"text": [json.dumps(told)]}}

NODE_CLASS_MAPPINGS = {"Holds": Holds}
"""
SIZE = 50 << 20  # at least, of the file: copies of it would be seen


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ComfyServer, int]]:
    base = tmp_path_factory.mktemp("long")
    dims = replace(grouped.DIMS, hidden_size=256, context_size=EMOJI.context_size, vector_size=EMOJI.vector_size)
    layout = files.FFNLayout(shared=256, experts=12, width=64)
    split = files.split(files.dense_flux(dims), dims, layout, groups=GROUPS, mean=True)
    file = files.save(split, base / "models" / "diffusion_models" / "moe.safetensors")
    assert file.stat().st_size > SIZE
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "holds.py").write_text(HOLDS)
    (base / "custom_nodes" / "tiny_conditioning.py").write_text(TINY_CONDITIONING)
    with ComfyServer(base) as running:
        yield running, file.stat().st_size


def run(server: ComfyServer, index: int, top_k: int, active_blocks: int, mask: str, pieces: str) -> dict[str, Any]:
    graph: ApiGraph = {
        "moe": node("D2MLoadFluxMoE", model_name="moe.safetensors", weight_dtype="default"),
        "k": node("D2MTopK", model=["moe", 0], top_k=top_k, gate="as in the file"),
        "blocks": node("D2MActiveBlocks", model=["k", 0], active_blocks=active_blocks, per_group=""),
        "mask": node("D2MExpertMask", model=["blocks", 0], mask=mask),
        "schedule": node("D2MSchedule", model=["mask", 0], setting="top_k", unit="percent", pieces=pieces),
        "positive": node("TinyConditioning", seed=1),
        "negative": node("TinyConditioning", seed=2),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        "sampler": node(
            "KSampler", model=["schedule", 0], seed=1, steps=2, cfg=2.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0],
        ),
        "holds": node("Holds", latent=["sampler", 0], run=index),
    }  # fmt: skip
    entry = server.wait(server.queue(graph))
    told: dict[str, Any] = json.loads(entry["outputs"]["holds"]["text"][0])
    return told


def test_runs_with_other_settings_hold_no_more_memory(server: tuple[ComfyServer, int]) -> None:
    running, size = server
    found = []
    for index in range(21):
        if index % 5 == 0:  # the same each time
            settings: tuple[int, int, str, str] = (2, 1, "", "0.0 - 0.5: 4")
        else:
            mask = f"single_blocks.*: {index % 12}=0" if index % 3 else ""
            settings = (index % 13, index % 6, mask, f"0.0 - {index / 60 + 0.1:.2f}: {index % 5}")
        found.append(run(running, index, *settings))
        if index % 10 == 7:
            running.post("/free", {"unload_models": True, "free_memory": index < 10})
    assert {it["models"] for it in found} == {1}
    assert len({it["mean"] for it in found}) >= 14  # settings do something
    same = found[10::5]
    assert len({it["mean"] for it in same}) == 1
    assert len({it["tensors"] for it in same}) == 1
    assert same[-1]["anonymous"] - same[0]["anonymous"] < size / 2


def test_unloading_gives_the_memory_back(server: tuple[ComfyServer, int]) -> None:
    """/free takes the model from memory, and the next run loads it again: no more of it than before."""
    running, size = server
    found = []
    for index in range(100, 104):
        found.append(run(running, index, index % 13, 2, "", "0.0 - 0.5: 4"))
        running.post("/free", {"unload_models": True, "free_memory": True})
    assert {it["models"] for it in found} == {1}
    assert len({it["tensors"] for it in found[1:]}) == 1
    assert found[-1]["anonymous"] - found[1]["anonymous"] < size / 2


def test_a_server_writes_no_warning_about_us(server: tuple[ComfyServer, int]) -> None:
    lines = Path(server[0].log).read_text().lower().splitlines()
    assert not [line for line in lines if "d2m" in line and any(word in line for word in ("warn", "error", "failed"))]
