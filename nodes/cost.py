"""Costs of a FLUX-MoE under given settings: GET /d2m/cost, and the configurations of nodes that have run.

GET /d2m/cost?model_name=FILE          a file in diffusion_models, dense or FLUX-MoE
GET /d2m/cost?node=EXECUTION_ID        a node that has run and returned a FLUX-MoE; with &workflow=ID, in that workflow
    &top_k= &active_blocks=N or N,N,… &capacity= &width= &height= &text_tokens=
    &budget=   a share of the dense model's FLOPs, in place of top_k, active_blocks and capacity: the mean of a run's steps

A node is known by its id; without the workflow's id, another workflow with a node of the same id may have run since. So
`of` in the answer names the model that was counted. Costs are counted as in `python -m d2m_train report`. A setting that
the model does not have (top_k of a file with capacity routers, active blocks of one without block groups) changes
nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import folder_paths
from aiohttp import web
from comfy_execution.utils import get_executing_context

from ..d2m_model.budget import cost_of
from ..d2m_model.checkpoint import CONFIG_KEY, CheckpointError, check_depths, dims_of, parse_config
from ..d2m_model.config import PATCH_PIXELS, FluxDims, FluxMoEConfig
from ..d2m_model.cost import DENSE, Conversion, Cost, Tokens, flux
from ..d2m_model.foreign import printable
from ..d2m_model.tensor_file import TensorFile
from .model.settings import active_blocks
from .prompt_graph import PromptGraph, result_digests
from .prompt_server import RequestError, executing_items, prompt_server, with_json_errors

_MAX_SIDE = 16_384  # pixels
_MAX_BLOCKS = 10_000  # of a group
_MAX_TEXT_TOKENS = 100_000
_MAX_CAPACITY = 1000.0
_SHOWN = 200  # characters of a file's own words
_WITHOUT_TABLE = "The budget is one value for all FFNs and steps, since the file has no sensitivity table."
_REMEMBERED = 1024  # nodes, files and results

KnownModel = FluxDims | FluxMoEConfig  # dense or FLUX-MoE


# Models that are known


class RecentModels:
    """The last `size` models by key. Used by two threads: the executor's and the event loop's."""

    def __init__(self, size: int = _REMEMBERED) -> None:
        self._size, self._lock = size, threading.Lock()
        self._models: OrderedDict[Hashable, KnownModel] = OrderedDict()

    def put(self, key: Hashable, model: KnownModel) -> bool:
        """Remember a model. Returns whether it is another than before."""
        with self._lock:
            changed = self._models.get(key) != model
            self._models[key] = model
            self._models.move_to_end(key)
            while len(self._models) > self._size:
                self._models.popitem(last=False)
            return changed

    def get(self, key: Hashable) -> KnownModel | None:
        with self._lock:
            return self._models.get(key)


# By (workflow, node), and ("", node) for the last workflow; by file; by the digest of a node's result.
_BY_NODE, _BY_FILE, _BY_RESULT = RecentModels(), RecentModels(), RecentModels()


def remember_model(config: FluxMoEConfig) -> None:
    """Remember that the executing node returns a FLUX-MoE of this configuration, and log its cost if that is new.

    ComfyUI says which node that is: a node that asked for its own id would not be taken from the cache under another
    id. And nothing is added to the node's output, so ComfyUI can cache it as it is.
    """
    context = get_executing_context()
    if context is None:
        return
    node = str(context.node_id)
    item = next((item for item in executing_items() if item[1] == context.prompt_id), None)
    graph: PromptGraph = item[2] if item else {}
    if _BY_NODE.put(("", node), config):
        logging.info("FLUX-MoE of node %s: %s", printable(node), cost_report(config, {})["text"])
    _BY_NODE.put((_workflow_id(item[3] if item else {}), node), config)
    if digest := result_digests(graph, [node]).get(node):
        _BY_RESULT.put(digest, config)


def recognise_cached_results(json_data: dict[str, Any]) -> dict[str, Any]:
    """Handle PromptServer's on_prompt: a node whose result ComfyUI has cached under another node's id does not run."""
    graph = json_data.get("prompt")
    if isinstance(graph, dict) and all(isinstance(node.get("inputs"), dict) for node in graph.values()):
        for node, digest in result_digests(graph, graph).items():
            if (model := _BY_RESULT.get(digest)) is not None:
                _BY_NODE.put((_workflow_id(json_data.get("extra_data")), node), model)
                _BY_NODE.put(("", node), model)
    return json_data


def _workflow_id(extra_data: Any) -> str:
    """Return the id of the workflow from which a prompt was queued; "" for a prompt without one."""
    found = extra_data
    for key in ("extra_pnginfo", "workflow", "id"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""


# Answers


def cost_answer(query: Mapping[str, str]) -> dict[str, Any]:
    """Return the answer to a query as JSON. Raises RequestError."""
    model, name = _requested_model(query)
    report = cost_report(model, query)
    if "node" in query:
        report["text"] += f" Of {name}."  # shown in the readout's tooltip
    return {**report, "of": name}


def _requested_model(query: Mapping[str, str]) -> tuple[KnownModel, str]:
    """Return the model that a query names, and its description. Raises RequestError."""
    name, node = query.get("model_name"), query.get("node")
    if (name is None) == (node is None):
        raise RequestError(
            400, "Give model_name (a file in diffusion_models) or node (the execution id of a node), not both."
        )
    if node is not None:
        if (model := _BY_NODE.get((query.get("workflow", ""), node))) is None:
            raise RequestError(404, f"Node {node[:40]} has given no FLUX-MoE yet. Queue the workflow.")
        return model, f"what node {node[:40]} gave last: {_describe(model)}"
    assert name is not None
    if name not in folder_paths.get_filename_list("diffusion_models"):
        raise RequestError(404, f"There is no {name[:200]} in diffusion_models.")
    path = folder_paths.get_full_path_or_raise("diffusion_models", name)
    try:
        return _read_model(path), name
    except CheckpointError as error:
        raise RequestError(400, str(error)) from None
    except OSError as error:
        raise RequestError(404, f"{name[:200]}: cannot be read ({error.strerror or error}).") from None


def _read_model(path: str) -> KnownModel:
    status = os.stat(path)
    key = path, status.st_size, status.st_mtime_ns
    model = _BY_FILE.get(key)
    if model is None:
        with TensorFile(path) as file:
            if CONFIG_KEY in file.shapes:
                model = parse_config(file.tensor(CONFIG_KEY))
                check_depths(model.dims, len(file.shapes))
            else:
                model = dims_of(file.shapes)
        _BY_FILE.put(key, model)
    return model


def _describe(model: KnownModel) -> str:
    if isinstance(model, FluxDims):
        return "a dense FLUX"
    provenance = model.provenance
    data = provenance.get("data")
    text = f"preset {str(provenance.get('preset', '?'))[:_SHOWN]} of {model.teacher.title[:_SHOWN]}"
    return (
        f"{text}, calibrated with {str(data['name'])[:_SHOWN]}" if isinstance(data, dict) and "name" in data else text
    )


def cost_report(model: KnownModel, query: Mapping[str, str]) -> dict[str, Any]:
    """Return the cost under the settings of a query. Raises RequestError for a setting that no node would take.

    `settings` names those of the model that Top-K nodes can change.
    """
    width, height = (_whole_number(query, side, 1024, PATCH_PIXELS, _MAX_SIDE) for side in ("width", "height"))
    budgeted = isinstance(model, FluxMoEConfig) and bool(query.get("budget"))
    table = model.sensitivity if isinstance(model, FluxMoEConfig) and budgeted else None
    # The Budget node does not know the prompt when it spends, so it counts the text tokens of the table.
    usual = 512 if table is None else table.text_tokens
    text = _whole_number(query, "text_tokens", usual, 0, _MAX_TEXT_TOKENS)
    tokens = Tokens(image=-(-width // PATCH_PIXELS) * -(-height // PATCH_PIXELS), text=text)
    dims = model if isinstance(model, FluxDims) else model.dims
    notes: list[str] = []
    conversion = DENSE if isinstance(model, FluxDims) else _requested_conversion(model, query, notes)
    dense, cost = flux(dims, DENSE, tokens), flux(dims, conversion, tokens)
    if isinstance(model, FluxMoEConfig) and budgeted:
        cost = cost_of(model, _number(query, "budget", 1, 1), tokens)
        notes = [] if table is not None else [_WITHOUT_TABLE]
    sliders: dict[str, Any] = {"experts": 0, "groups": [], "settings": []}
    if isinstance(model, FluxMoEConfig):
        sliders["settings"] = [model.router.setting, "gate"] if model.ffns else []
        sliders["experts"] = model.router.highest(model.fewest_experts) or 0
        sliders["groups"] = [group.blocks for group in model.groups]
    return {
        "is_dense": isinstance(model, FluxDims),
        "width": width,
        "height": height,
        "total": round(cost.total),
        **_figures(cost),
        "dense": _figures(dense),
        "flops_ratio": cost.flops / dense.flops,
        "text": " ".join([_sentence(cost, dense, f"{width} × {height} pixels and {text} text tokens"), *notes]),
        **sliders,
    }


def _requested_conversion(config: FluxMoEConfig, query: Mapping[str, str], notes: list[str]) -> Conversion:
    """Return the conversion under the settings of a query, and add remarks on the figures to `notes`.

    Raises RequestError.
    """
    router, experts, value = config.router, config.fewest_experts, config.router_value
    highest = router.highest(experts)
    if highest is None:
        value = _number(query, router.setting, value, _MAX_CAPACITY)
    elif experts:
        value = _whole_number(query, router.setting, int(value), 0, highest)
    if (note := router.note(value, experts)) is not None:
        notes.append(note)
    active = None
    if config.groups:
        try:
            active = active_blocks(_requested_blocks(query.get("active_blocks", "")), config.groups)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
    return Conversion.of(config, value, active_blocks=active)


def _requested_blocks(text: str) -> int | list[int] | None:
    """Parse active_blocks as the node Active blocks does. Raises ValueError."""
    try:
        numbers = [int(part) for part in text.split(",")] if text.strip() else []
        if any(not 0 <= number <= _MAX_BLOCKS for number in numbers):
            raise ValueError
    except ValueError:
        raise ValueError(f"active_blocks is {text[:40]!r}; expected a number, or one for each group: 1,0,2.") from None
    return None if not numbers else numbers[0] if "," not in text else numbers


def _whole_number(query: Mapping[str, str], name: str, default: int, smallest: int, largest: int) -> int:
    text = query.get(name, "")
    value = default if not text else int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if not smallest <= value <= largest:
        raise RequestError(400, f"{name} is {text[:40]!r}; expected a whole number, {smallest} to {largest}.")
    return value


def _number(query: Mapping[str, str], name: str, default: float, largest: float) -> float:
    text = query.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 <= value <= largest:
        raise RequestError(400, f"{name} is {text[:40]!r}; expected a number, 0 to {largest:g}.")
    return value


def _figures(cost: Cost) -> dict[str, int]:
    return {"touched": round(cost.touched), "paper": round(cost.paper), "flops": round(cost.flops)}


def _sentence(cost: Cost, dense: Cost, where: str) -> str:
    size, unit = (1e9, "B") if dense.total >= 1e9 else (1e6, "M")
    work, flops = (1e12, "TFLOPs") if dense.flops >= 1e12 else (1e9, "GFLOPs")
    return (
        f"{cost.touched / size:.2f} of {dense.touched / size:.2f} {unit} parameters are active "
        f"({cost.paper / size:.2f} {unit} as the paper counts), and {cost.flops / work:.2f} of {dense.flops / work:.2f} "
        f"{flops} per evaluation ({cost.flops / dense.flops:.0%} of the dense model), at {where}."
    )


# The route


@with_json_errors
async def get_cost(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(cost_answer, request.query))


def register() -> None:
    """Add the route and the handler of prompts, if ComfyUI runs a server."""
    server = prompt_server()
    if server is not None:
        server.routes.get("/d2m/cost")(get_cost)
        server.add_on_prompt_handler(recognise_cached_results)
