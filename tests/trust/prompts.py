"""Many prompts in one ComfyUI, in which settings, LoRAs, models and live values change and prompts are interrupted.

Every sampled latent is bit for bit what a fresh process samples, and the server's memory stays flat. A prompt whose
live values changed is compared with a replay of its log.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.in_process import Comfy
from demo.server import ApiGraph, ComfyServer, ServerError
from tests.comfyui.serving import TINY_CONDITIONING, node, write_base
from tests.trust import subjects
from tests.trust.limits import Fault, growth, memory
from tests.trust.requests import DISCARD

_PLAIN, _GROUPED = ("D2MTopK", "D2MSchedule", "D2MExpertMask", "D2MBudget"), ("D2MActiveBlocks",)
_MODELS = {  # and the controls that they take
    "emoji-flux-moe": _PLAIN,
    "grouped": _PLAIN + _GROUPED,
    "capacity": ("D2MTopK", "D2MExpertMask"),
    "XS": _PLAIN + _GROUPED,
}
_LORAS = ("first", "second")
_STEPS, _LONG = (1, 2, 3), 40  # steps of a prompt, and of one that is moved or interrupted while it samples
_BYTES = 8 << 20  # by which memory may grow, besides its share
_SECONDS = 120.0  # for one prompt
_PIECES = ("0 % - 50 %: {}", "0 % - 100 %: {}\n40 % - 60 %: 0", "30 % - 70 %: {} # the middle")
_MASKS = ("single_blocks.*: 3=0, 5=2", "*: *=0.5\n*: 0=1", "double_blocks.*: 1=0", "")


def measure(count: int, seed: int, base: Path) -> dict[str, Any]:
    """Run `count` prompts. Return counts. Raises Fault."""
    write_base(base)
    (base / "custom_nodes" / "discard.py").write_text(DISCARD)
    (base / "models" / "loras").mkdir()
    for number, name in enumerate(_LORAS):
        lora = subjects.lora(lambda layer: f"lora_unet_{layer.replace('.', '_')}", "lora_down.weight", "lora_up.weight")
        scaled = {key: tensor * (1 + number) for key, tensor in lora.items()}
        save_file(scaled, base / "models" / "loras" / f"{name}.safetensors")
    fresh = FreshProcesses(base)
    with ComfyServer(base, arguments=("--cpu", "--use-pytorch-cross-attention")) as server:
        return Session(server, fresh).run(count, seed)


class FreshProcesses:
    """Runs graphs in processes that have imported ComfyUI and done nothing else: copies of this one."""

    def __init__(self, base: Path) -> None:
        self._host = Comfy(base)
        self._host.load_pack()
        self._file, self._trouble = base / "reference.safetensors", base / "reference.log"
        made: dict[str, Any] = {}
        exec(TINY_CONDITIONING, made)
        self._host.nodes.NODE_CLASS_MAPPINGS |= made["NODE_CLASS_MAPPINGS"]
        self._known: dict[str, Tensor | None] = {}

    def distinct(self) -> int:
        """Return how many different latents were sampled."""
        return len({tensor.numpy().tobytes() for tensor in self._known.values() if tensor is not None})

    def sample(self, graph: ApiGraph) -> Tensor | None:
        """Return the latent of the graph's sampler; None if a node refuses its inputs."""
        key = json.dumps(graph, sort_keys=True)
        if key not in self._known:
            self._file.unlink(missing_ok=True)
            process = os.fork()
            if process == 0:
                self._sample_and_end(graph)
            _, status = os.waitpid(process, 0)
            if status:
                raise Fault(f"a fresh process ended with status {status}: {self._trouble.read_text()[-2000:]}")
            self._known[key] = load_file(self._file).get("samples")
        return self._known[key]

    def _sample_and_end(self, graph: ApiGraph) -> None:
        try:
            signal.alarm(int(_SECONDS))
            os.dup2(os.open(self._trouble, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            with torch.inference_mode():
                try:
                    found = {"samples": self._output(graph, "sampler")["samples"].clone()}
                except ValueError:
                    found = {}
                save_file(found, self._file)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _output(self, graph: ApiGraph, name: str) -> Any:
        inputs = {
            key: self._output(graph, value[0]) if isinstance(value, list) else value
            for key, value in graph[name]["inputs"].items()
        }
        kind = graph[name]["class_type"]
        if not hasattr(self._host.nodes.NODE_CLASS_MAPPINGS[kind], "define_schema"):
            return self._host.run(kind, **inputs)
        from comfy_api.latest import io

        return self._host.execute(kind, hidden={io.Hidden.unique_id: name}, **inputs).result[0]


class Session:
    """One ComfyUI, and what a seed draws for it."""

    def __init__(self, server: ComfyServer, fresh: FreshProcesses) -> None:
        self._server, self._fresh = server, fresh
        self.outcomes: Counter[str] = Counter()

    def run(self, count: int, seed: int) -> dict[str, Any]:
        process = self._server.process
        assert process is not None
        resident: list[int] = []
        graphs = _graphs(Random(f"{seed}-settings"), max(2, count // 3))
        for number in range(count):
            random = Random(f"{seed}-{number}")
            graph = random.choice(graphs)
            how = random.choices(("run", "moved", "interrupted"), (8, 2, 1))[0]
            try:
                self._prompt(graph, how, number, random)
            except (Fault, ServerError) as fault:
                raise Fault(f"number {number}, {how}: {fault}\n{json.dumps(graph)}") from None
            self._server.post("/history", {"clear": True})
            resident.append(memory("VmRSS", process.pid))
            if number % 20 == 19:
                print(f"prompts: {number + 1} of {count}, {dict(self.outcomes)}, {resident[-1]:,} bytes", flush=True)
        return {
            "prompts": count,
            "settings": len(graphs),
            "distinct_latents": self._fresh.distinct(),
            "outcomes": dict(self.outcomes),
            **growth(resident, _BYTES),
        }

    def _prompt(self, graph: ApiGraph, how: str, number: int, random: Random) -> None:
        if how != "run":
            graph = {**graph, "sampler": node("KSampler", **{**graph["sampler"]["inputs"], "steps": _LONG})}
        prompt = self._server.queue(
            {**graph, "end": node("SaveLatent", samples=["sampler", 0], filename_prefix=f"n{number}")}
        )
        if how == "moved":
            self._move(prompt, graph, random)
        if how == "interrupted" and self._has_begun(prompt):
            self._server.post("/interrupt", {})
        try:
            entry = self._server.wait(prompt, _SECONDS)
        except ServerError as error:
            if self._fresh.sample(graph) is not None:
                raise Fault(f"the server refuses what a fresh process samples: {error}") from None
            self.outcomes["refused"] += 1
            return
        if entry["status"]["status_str"] != "success":
            if how != "interrupted":
                raise Fault(f"it ended with {entry['status']}")
            self.outcomes["interrupted"] += 1
            return
        log = self._log(prompt)
        moved = how == "moved" and bool(log["evaluations"])
        reference = _replay(graph, log) if moved else graph
        expected = self._fresh.sample(reference)
        (saved,) = entry["outputs"]["end"]["latents"]
        path = self._server.base / "output" / saved["subfolder"] / saved["filename"]
        found = load_file(path)["latent_tensor"]
        path.unlink()
        if expected is None or not torch.equal(found, expected):
            distance = "which refuses it" if expected is None else f"by {(found - expected).abs().max():.3g}"
            raise Fault(f"another latent than a fresh process's, {distance}; moved: {moved}")
        self.outcomes["moved" if moved else "equal"] += 1

    def _has_begun(self, prompt: str, evaluations: int = 1) -> bool:
        """Wait until a prompt has evaluated its model so often; False if it ends before, or has no log."""
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline and prompt not in self._server.get(f"/history/{prompt}"):
            if len(self._log(prompt)["evaluations"]) >= evaluations:
                return True
            time.sleep(0.01)
        return False

    def _log(self, prompt: str) -> dict[str, Any]:
        runs = (run for run in self._server.get("/d2m/log")["runs"] if run["prompt_id"] == prompt)
        return next(runs, {"evaluations": []})

    def _move(self, prompt: str, graph: ApiGraph, random: Random) -> None:
        """Move widgets while the prompt samples."""
        for evaluations in (1, random.randint(2, _LONG // 2)):
            if self._has_begun(prompt, evaluations):
                controls = [name for name in graph if name.startswith("control")]
                moved = random.choice(controls)
                values = _widgets(graph[moved]["class_type"], random)
                values.pop("setting", None)
                values.pop("unit", None)
                self._server.post("/d2m/live", {"nodes": [moved], "values": values, "prompt_id": prompt})


def _graphs(random: Random, count: int) -> list[ApiGraph]:
    """Draw graphs: a model, LoRAs before or behind up to three controls, and a sampler."""
    return [_graph(random) for _ in range(count)]


def _graph(random: Random) -> ApiGraph:
    model = random.choice(list(_MODELS))
    name = f"{model}.safetensors"
    graph: ApiGraph = {
        "loader": random.choice(
            (
                node("D2MLoadFluxMoE", model_name=name, weight_dtype="default"),
                node("UNETLoader", unet_name=name, weight_dtype="default"),
            )
        ),
        "positive": node("TinyConditioning", seed=1),
        "negative": node("TinyConditioning", seed=2),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=random.choice((1, 1, 2))),
    }
    parts = list(_controls(_MODELS[model], random))
    for lora in random.sample(_LORAS, random.choice((0, 0, 1, 2))):
        loader = node(
            "LoraLoaderModelOnly", lora_name=f"{lora}.safetensors", strength_model=random.choice((-0.5, 0.3, 1.0))
        )
        parts.insert(random.randint(0, len(parts)), (f"lora {lora}", loader))
    last = "loader"
    for part, made in parts:
        graph[part] = node(made["class_type"], **made["inputs"], model=[last, 0])
        last = part
    graph["sampler"] = node(
        "KSampler", model=[last, 0], seed=random.randint(0, 3), steps=random.choice(_STEPS), cfg=random.choice((1.0, 1.0, 2.5)),
        sampler_name=random.choice(("euler", "heun", "dpmpp_2m")), scheduler="simple", denoise=1.0,
        positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0],
    )  # fmt: skip
    return graph


def _controls(kinds: tuple[str, ...], random: Random) -> Iterator[tuple[str, dict[str, Any]]]:
    for number in range(random.choice((1, 1, 2, 3))):
        kind = random.choice(kinds)
        yield f"control {number}", node(kind, **_widgets(kind, random))


def _widgets(kind: str, random: Random) -> dict[str, Any]:
    """Return values of a control's widgets. Some do not fit every model, which refuses them."""
    if kind == "D2MTopK":
        gate = random.choice(("as in the file", "sum", "normalised"))
        return {"top_k": random.randint(0, 12), "gate": gate, "capacity": random.choice((0.0, 1.0, 2.5))}
    if kind == "D2MActiveBlocks":
        return {"active_blocks": random.randint(0, 3), "per_group": ""}
    if kind == "D2MSchedule":
        pieces = random.choice(_PIECES).format(random.randint(0, 3))
        return {"setting": random.choice(("top_k", "active_blocks")), "unit": "percent", "pieces": pieces}
    if kind == "D2MBudget":
        return {"budget": random.choice((0.4, 0.6, 0.9))}
    return {"mask": random.choice(_MASKS)}


def _replay(graph: ApiGraph, log: dict[str, Any]) -> ApiGraph:
    """Return the graph with a Replay of `log` behind its LoRAs in place of its controls."""
    told = json.dumps([{key: value for key, value in log.items() if key not in ("prompt_id", "finished")}])
    kept = {name: part for name, part in graph.items() if not name.startswith("control")}
    last = "loader"
    for name, part in kept.items():
        if name.startswith("lora"):
            kept[name] = {**part, "inputs": {**part["inputs"], "model": [last, 0]}}
            last = name
    kept["replay"] = node("D2MReplay", model=[last, 0], run=0, log=told)
    kept["sampler"] = node("KSampler", **{**graph["sampler"]["inputs"], "model": ["replay", 0]})
    return kept
