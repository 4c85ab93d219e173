"""Programs for a machine with two GPUs, run in a process of their own on a CUDA runtime that does nothing (fake_cuda.c).

Copies and allocations are the host's, and kernels do nothing. Where results would be read, tensors without values stand in.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.toys.fake_gpu import GPU, ROOT

# Keywords of CUDA's compiler in its header of types, which a C compiler does not know.
KEYWORDS = """
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __cuda_builtin_vector_align8(tag, members) struct __align__(8) tag { members }
"""


def headers() -> Path | None:
    """Return the folder of CUDA's headers among the packages that torch needs."""
    packages = Path(torch.__file__).parents[1]
    return next((found.parent for found in packages.glob("nvidia/*/include/driver_types.h")), None)


@functools.cache
def runtime() -> Path:
    """Return the runtime, built in a temporary folder. Skips the test without gcc or CUDA's headers."""
    include, version = headers(), torch.version.cuda
    if shutil.which("gcc") is None or include is None or version is None:
        pytest.skip("needs gcc, and the CUDA headers that come with torch")
    folder = Path(tempfile.mkdtemp())
    (folder / "crt").mkdir()
    (folder / "crt" / "host_defines.h").write_text(KEYWORDS)
    library, (major, minor) = folder / "libcuda.so.1", version.split(".")[:2]
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(
        ["gcc", "-w", "-shared", "-fPIC", f"-DCUDA={major}0{minor}0", f"-I{folder}", f"-I{include}",
         "-Wl,-soname,libcuda.so.1", source, "-o", library],
        check=True,
    )  # fmt: skip
    return library


def run(program: Callable[[], None]) -> None:
    """Run a program of this module, and show its output if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, program.__name__],
        cwd=ROOT, env={**os.environ, "LD_PRELOAD": str(runtime())}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# Programs


def training_step() -> None:
    """Run a student forward and backward under autocast, with recomputed blocks: a gradient for all that it trains."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.toys.fake_gpu import HostWaits
    from tests.toys.students import inputs_on, student_config, student_on

    with FakeTensorMode():
        model = student_on(GPU, student_config(capacity=True)).train()
        model.enable_gradient_checkpointing()
        with HostWaits() as recorded:
            with torch.autocast(GPU.type, torch.bfloat16):
                output = model(**inputs_on(GPU)).sample
            output.float().square().mean().backward()
        missing = {name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None}
        devices = {weight.grad.device for weight in model.parameters() if weight.grad is not None}
    assert devices == {GPU}, devices
    assert all(".capacity." in name for name in missing), missing  # the predictor learns by a loss of its own
    assert recorded.waits == set(), recorded.waits


def offloaded_routers() -> None:
    """Bring all tensors of offloaded routers to the GPU by ComfyUI's own streams: none overwrites another."""
    from d2m_model.routers import CapacityRouter
    from demo.in_process import Comfy
    from tests.comfyui.grouped import DIMS, GROUPS
    from tests.toys import files

    gpu, folder = torch.device("cuda:0"), Path(tempfile.mkdtemp())
    router = CapacityRouter(capacity=2.0, width=16)
    split = files.split(files.dense_flux(DIMS), DIMS, groups=GROUPS, mean=True, capacity=router)
    host = Comfy(folder, cpu=False)
    host.load_pack()
    import comfy.model_management

    assert comfy.model_management.NUM_STREAMS == 2
    patcher = host.load(files.save(split, folder / "moe.safetensors"))
    patcher.load(gpu, lowvram_model_memory=1)
    flux, router_weights = patcher.model.diffusion_model, host.module("nodes.model.blocks").router_weights
    for layer in flux.expert_layers:
        for name, tensor in layer.router_tensors(gpu).items():
            assert tensor.device == gpu
            assert torch.equal(tensor.cpu(), split[f"{layer.name}.{name}"]), f"{layer.name}.{name}"
    for index, group in enumerate(flux.block_groups):
        parts = {name: router_weights(getattr(group, name), gpu)[0] for name in ("router_x", "router_y")}
        for name, weight in parts.items():
            assert torch.equal(weight.cpu(), split[f"block_groups.{index}.{name}.weight"])
    assert len(comfy.model_management.STREAM_CAST_BUFFERS) == 2  # they were used


if __name__ == "__main__":
    {program.__name__: program for program in (training_step, offloaded_routers)}[sys.argv[1]]()
