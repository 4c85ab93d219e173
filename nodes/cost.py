"""What a FLUX-MoE costs under the settings of a moment: GET /d2m/cost, and the configurations of nodes that have run.

GET /d2m/cost?model_name=FILE          a file in diffusion_models, dense or FLUX-MoE
GET /d2m/cost?node=EXECUTION_ID        a node that has run and gave a FLUX-MoE
    &top_k= &active_blocks=N or N,N,… &capacity= &width= &height= &text_tokens=

A node is known by its id: another workflow may have run since with a node of the same, so the answer's `of` says what it
is of. Counted as `python -m d2m_train report` counts. A setting that the model does not have (top_k of a file with capacity
routers, active blocks of one without groups) changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import folder_paths
from aiohttp import web
from comfy_execution.utils import get_executing_context

from ..d2m_model.checkpoint import CONFIG_KEY, CheckpointError, dims_of, parse_config
from ..d2m_model.config import PATCH_PIXELS, FluxDims, FluxMoEConfig
from ..d2m_model.cost import DENSE, Conversion, Cost, Tokens, experts_at, flux
from ..d2m_model.tensor_file import TensorFile
from .controls.metadata_log import Graph, computed_from
from .model.settings import active_blocks
from .prompt_server import executing, prompt_server

MOST_PIXELS = 16_384  # on a side
MOST_TEXT = 100_000  # tokens
MOST_CAPACITY = 1000.0
REMEMBERED = 1024  # nodes, and files

Model = FluxDims | FluxMoEConfig  # dense, or not


class Refused(ValueError):
    """What is asked for cannot be; `status` is HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


# What is known


class Known:
    """The last so many configurations, by any key. Executor and event loop are two threads."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most, self._lock = most, threading.Lock()
        self._models: OrderedDict[Any, Model] = OrderedDict()

    def put(self, key: Any, model: Model) -> bool:
        """Whether that is new."""
        with self._lock:
            new = self._models.get(key) != model
            self._models[key] = model
            self._models.move_to_end(key)
            while len(self._models) > self._most:
                self._models.popitem(last=False)
            return new

    def get(self, key: Any) -> Model | None:
        with self._lock:
            return self._models.get(key)


NODES, FILES = Known(), Known()
RESULTS = Known()  # by what a node's result is computed from


def remember(config: FluxMoEConfig) -> None:
    """The node that is executing gives a FLUX-MoE of this configuration. The log says once what it costs.

    Which node that is ComfyUI knows: one that asked for its own id would not be taken from the cache under another. And
    nothing is added to its output, so what ComfyUI keeps of it stays as it is.
    """
    context = get_executing_context()
    if context is None:
        return
    node = str(context.node_id)
    if NODES.put(node, config):
        logging.info("FLUX-MoE of node %s: %s", node, costs(config, {})["text"])
    graph: Graph = next((item[2] for item in executing() if item[1] == context.prompt_id), {})
    if result := computed_from(graph, [node], {}).get(node):
        RESULTS.put(result, config)


def recognise(json_data: dict[str, Any]) -> dict[str, Any]:
    """PromptServer's on_prompt handler: a node whose result ComfyUI has in its cache, from another id, does not run."""
    graph = json_data.get("prompt")
    if isinstance(graph, dict) and all(isinstance(node.get("inputs"), dict) for node in graph.values()):
        for node, result in computed_from(graph, graph, {}).items():
            if (model := RESULTS.get(result)) is not None:
                NODES.put(node, model)
    return json_data


def answer(query: Mapping[str, str]) -> dict[str, Any]:
    """Raises Refused."""
    model, of = model_of(query)
    found = costs(model, query)
    if "node" in query:  # which shows in the readout's tooltip
        found["text"] += f" Of {of}."
    return {**found, "of": of}


def model_of(query: Mapping[str, str]) -> tuple[Model, str]:
    """What is asked about, and what to call it. Raises Refused."""
    name, node = query.get("model_name"), query.get("node")
    if (name is None) == (node is None):
        raise Refused(
            400, "Give model_name (a file in diffusion_models) or node (the execution id of a node), one of them."
        )
    if node is not None:
        if (found := NODES.get(node)) is None:
            raise Refused(404, f"Node {node[:40]} has given no FLUX-MoE yet. Queue the workflow.")
        return found, f"what node {node[:40]} gave last: {described(found)}"
    assert name is not None
    if name not in folder_paths.get_filename_list("diffusion_models"):
        raise Refused(404, f"There is no {name[:200]} in diffusion_models.")
    path = folder_paths.get_full_path_or_raise("diffusion_models", name)
    try:
        about = os.stat(path)
        key = path, about.st_size, about.st_mtime_ns
        model = FILES.get(key)
        if model is None:
            with TensorFile(path) as file:
                model = parse_config(file.tensor(CONFIG_KEY)) if CONFIG_KEY in file.shapes else dims_of(file.shapes)
            FILES.put(key, model)
    except CheckpointError as error:
        raise Refused(400, str(error)) from None
    except OSError as error:
        raise Refused(404, f"{name[:200]}: cannot be read ({error.strerror or error}).") from None
    return model, name


def described(model: Model) -> str:
    if isinstance(model, FluxDims):
        return "a dense FLUX"
    known = model.provenance
    data = known.get("data")
    about = f"preset {known.get('preset', '?')} of {model.teacher.title}"
    return f"{about}, calibrated with {data['name']}" if isinstance(data, dict) and "name" in data else about


# What it costs


def costs(model: Model, query: Mapping[str, str]) -> dict[str, Any]:
    """The answer. Raises Refused for a setting that no node would take."""
    width, height = (whole(query, side, 1024, PATCH_PIXELS, MOST_PIXELS) for side in ("width", "height"))
    text = whole(query, "text_tokens", 512, 0, MOST_TEXT)
    tokens = Tokens(image=-(-width // PATCH_PIXELS) * -(-height // PATCH_PIXELS), text=text)
    dims = model if isinstance(model, FluxDims) else model.dims
    notes: list[str] = []
    conversion = DENSE if isinstance(model, FluxDims) else settings_of(model, query, notes)
    dense, found = flux(dims, DENSE, tokens), flux(dims, conversion, tokens)
    about: dict[str, Any] = {"experts": 0, "groups": []}
    if isinstance(model, FluxMoEConfig):
        if model.capacity_router is None:
            about["experts"] = min((layout.experts for layout in model.ffns.values()), default=0)
        about["groups"] = [group.blocks for group in model.groups]
    return {
        "total": round(found.total),
        **figures(found),
        "dense": figures(dense),
        "flops_ratio": found.flops / dense.flops,
        "text": " ".join([sentence(found, dense, f"{width} × {height} pixels and {text} text tokens"), *notes]),
        **about,
    }


def settings_of(config: FluxMoEConfig, query: Mapping[str, str], notes: list[str]) -> Conversion:
    """`notes` fills with sentences on what the figures do not say. Raises Refused."""
    experts = min((layout.experts for layout in config.ffns.values()), default=0)
    top_k, capacity = None, number(query, "capacity", 1.0, MOST_CAPACITY)
    if config.capacity_router is not None:
        mean = experts_at(capacity, config)
        if capacity in (0, 1):
            notes.append(f"Capacity {capacity:g}: {mean:g} experts a token on average.")
        else:
            notes.append(
                f"At capacity {capacity:g} an estimate: about {mean:.1f} experts a token, which depends on the image."
            )
    elif experts:
        top_k = whole(query, "top_k", config.top_k, 0, experts)
    active = None
    if config.groups:
        try:
            active = active_blocks(blocks_asked(query.get("active_blocks", "")), config.groups)
        except ValueError as error:
            raise Refused(400, str(error)) from None
    return Conversion.of(config, top_k, active_blocks=active, capacity=capacity)


def blocks_asked(text: str) -> int | list[int] | None:
    """As the node Active blocks has it. Raises ValueError."""
    try:
        numbers = [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise ValueError(f"active_blocks is {text[:40]!r}; expected a number, or one for each group: 1,0,2.") from None
    return None if not numbers else numbers[0] if "," not in text else numbers


def whole(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name, "")
    value = default if not text else int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if not least <= value <= most:
        raise Refused(400, f"{name} is {text[:40]!r}; expected a whole number, {least} to {most}.")
    return value


def number(query: Mapping[str, str], name: str, default: float, most: float) -> float:
    text = query.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise Refused(400, f"{name} is {text[:40]!r}; expected a number, 0 to {most:g}.")
    return value


def figures(cost: Cost) -> dict[str, int]:
    return {"touched": round(cost.touched), "paper": round(cost.paper), "flops": round(cost.flops)}


def sentence(found: Cost, dense: Cost, where: str) -> str:
    size, unit = (1e9, "B") if dense.total >= 1e9 else (1e6, "M")
    work, flop = (1e12, "TFLOPs") if dense.flops >= 1e12 else (1e9, "GFLOPs")
    return (
        f"{found.touched / size:.2f} of {dense.touched / size:.2f} {unit} parameters are active "
        f"({found.paper / size:.2f} {unit} as the paper counts), and {found.flops / work:.2f} of {dense.flops / work:.2f} "
        f"{flop} per evaluation ({found.flops / dense.flops:.0%} of the dense model), at {where}."
    )


# The route


async def get_cost(request: web.Request) -> web.Response:
    query = request.query
    try:
        return web.json_response(await asyncio.to_thread(answer, query))
    except Refused as error:
        return web.json_response({"error": str(error)}, status=error.status)


def register() -> None:
    """The route, and the handler of prompts, where there is a server."""
    server = prompt_server()
    if server is not None:
        server.routes.get("/d2m/cost")(get_cost)
        server.add_on_prompt_handler(recognise)
