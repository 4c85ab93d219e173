"""ComfyUI in this Python process, mostly on the CPU and without a server: tests and benchmarks call its nodes directly."""

from __future__ import annotations

import asyncio
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tools.host import ROOT, host_in_use

CONTEXT_TOKENS = 7


class Comfy:
    """The ComfyUI in use, imported; at most one in a process. Models, input and output lie in `base`."""

    def __init__(self, base: Path, *, cpu: bool = True) -> None:
        # Ahead of the project's root, which has a package called nodes as well.
        sys.path.insert(0, str(host_in_use().path))
        from comfy.cli_args import args

        args.cpu = cpu
        args.base_directory = str(base)
        # ComfyUI's own choice for a CPU depends on the free memory.
        args.use_pytorch_cross_attention = True
        self.nodes = importlib.import_module("nodes")
        self.base = base
        self.pack_name = str(ROOT).replace(".", "_x_")  # as ComfyUI names it

    def load_pack(self) -> None:
        """Load this pack as ComfyUI loads a custom node."""
        # This process may import the method as d2m_model too. A second copy would register its torch operators in
        # place of the first one's, so here, unlike in the server, the pack gets the same modules.
        for name in ("checkpoint", "config", "experts", "layout", "mob", "routers.capacity_routing", "routers.top_k"):
            importlib.import_module(f"d2m_model.{name}")
        shared = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "d2m_model"}
        sys.modules.update({f"{self.pack_name}.{name}": module for name, module in shared.items()})
        with ThreadPoolExecutor(1) as thread:  # a browser's driver may have its event loop in the main thread
            loaded = thread.submit(asyncio.run, self.nodes.load_custom_node(str(ROOT))).result()
        assert loaded, "ComfyUI could not load the pack"

    def module(self, name: str) -> ModuleType:
        """Return a module of the pack as ComfyUI has imported it, such as nodes.files.load_node."""
        return importlib.import_module(f"{self.pack_name}.{name}")

    def run(self, node_id: str, **inputs: Any) -> Any:
        """Return the first output of a node, this pack's or ComfyUI's."""
        node = self.nodes.NODE_CLASS_MAPPINGS[node_id]
        if hasattr(node, "define_schema"):
            return self.execute(node_id, **inputs).result[0]
        return getattr(node(), node.FUNCTION)(**inputs)[0]

    def execute(self, node_id: str, hidden: dict[str, Any] | None = None, **inputs: Any) -> Any:
        """Return all outputs of a node of the V3 schema. `hidden`: values that ComfyUI gives it besides its inputs."""
        node = self.nodes.NODE_CLASS_MAPPINGS[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": hidden or {}})
        with torch.inference_mode():
            return node.execute(**inputs)

    def unload(self) -> None:
        """Remove every model from the device's memory, and all patches from their weights."""
        import comfy.model_management

        comfy.model_management.unload_all_models()

    def load(self, file: Path) -> Any:
        """Load a file as Load Diffusion Model does."""
        import comfy.sd

        return comfy.sd.load_diffusion_model(str(file))

    def top_k(self, model: Any, top_k: int, gate: str = "as in the file") -> Any:
        """Return the MODEL with another Top-K."""
        return self.run("D2MTopK", model=model, top_k=top_k, gate=gate)

    def control(self, node_id: str, model: Any, *, node: str | None = None, **inputs: Any) -> Any:
        """Return the MODEL output of a control, which is node `node` of a prompt."""
        from comfy_api.latest import io

        return self.execute(node_id, hidden={io.Hidden.unique_id: node}, model=model, **inputs).result[0]

    def with_settings(self, model: Any, **settings: Any) -> Any:
        """Return a clone with settings that no control has set. A control after it replaces them."""
        clone = model.clone()
        options = clone.model_options.get("transformer_options", {})
        clone.model_options["transformer_options"] = {**options, "d2m": {**options.get("d2m", {}), **settings}}
        return clone

    def sample(
        self,
        model: Any,
        size: tuple[int, int, int] = (1, 16, 16),
        *,
        seed: int = 0,
        cfg: float = 1.0,
        steps: int = 3,
        sampler: str = "euler",
        callback: Any = None,
    ) -> Tensor:
        """Sample latents from noise like KSampler. `size`: batch, height, width."""
        import comfy.sample

        batch, height, width = size
        noise = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))
        positive, negative = self.conditioning(model, 1), self.conditioning(model, 2)
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "simple", positive, negative, torch.zeros_like(noise), seed=seed,
            callback=callback,
        )  # fmt: skip

    def conditioning(self, model: Any, seed: int) -> list:
        """Make random conditioning for a model of any dimensions."""
        params = model.model.diffusion_model.params
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, CONTEXT_TOKENS, params.context_in_dim, generator=generator)
        pooled = torch.randn(1, params.vec_in_dim, generator=generator)
        return [[context, {"pooled_output": pooled, "guidance": 3.5}]]

    def evaluate(self, model: Any) -> Tensor:
        """Evaluate a MODEL that is loaded already, once, at sigma 0.7."""
        (context, rest), *_ = self.conditioning(model, 1)
        x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return model.model.apply_model(
                x, torch.tensor([0.7]), c_crossattn=context, y=rest["pooled_output"], guidance=torch.tensor([3.5]),
                transformer_options=model.model_options["transformer_options"],
            )  # fmt: skip
