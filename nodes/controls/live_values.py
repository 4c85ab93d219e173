"""Values that are moved while a prompt is sampling: the store of them, their routes, and the logs of the last runs.

A live value belongs to the prompt that is executing when it arrives and goes with it; a pending prompt keeps what it
was queued with. Every arrival gives the nodes that it names a new revision. It is in their fingerprint, so ComfyUI's
cache never gives what was made under live values for another setting: not even for the one that was queued.

Routes run in the event loop's thread, samplers in the executor's.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from comfy_execution.utils import get_executing_context

from ..prompt_server import executing, prompt_server
from .metadata_log import Graph, PromptLog, computed_from, plant, planted
from .transforms import KINDS

LAST_RUNS = 32
REMEMBERED = 256  # samplers' results whose logs are kept for when ComfyUI takes them from its cache
MOST_NODES = 1000
MOST_BYTES = 200_000

Run = dict[str, Any]  # as it is logged: see evaluation_settings.py


@dataclass(kw_only=True, slots=True)
class Prompt:
    """The prompt that is executing."""

    number: float  # in the queue
    prompt_id: str
    planted: PromptLog | None
    graph: Graph
    log: list[Run]  # what was planted, or one that no image has
    revisions: dict[str, int]  # of its nodes as it began
    results: dict[str, str]  # by node: run_log.computed_from
    values: dict[str, dict[str, Any]] = field(default_factory=dict)  # live ones by node
    fitting: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last of them that the file has
    warned: set[str] = field(default_factory=set)
    cached: dict[str, list[Run]] = field(default_factory=dict)  # what is in `log` of nodes that have not run


class Live:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = secrets.token_hex(4)  # ComfyUI may keep results beyond it (cache providers)
        self._revision = 0
        self._revisions: dict[str, int] = {}
        self._prompt: Prompt | None = None
        self._remembered: OrderedDict[str, list[Run]] = OrderedDict()
        self._last: deque[Run] = deque(maxlen=LAST_RUNS)
        self.running: Callable[[], Sequence[tuple]] = tuple  # the queue's items that are executing

    # Of the executor's thread

    def executing(self) -> tuple[Prompt, str] | None:
        """The prompt and the node that this thread executes; None outside of a server."""
        context = get_executing_context()
        if context is None:
            return None
        with self._lock:
            prompt = self._enter(context.prompt_id)
        return None if prompt is None else (prompt, context.node_id)

    def fingerprint(self, node: str) -> str:
        """The revision of a node's live values as the executing prompt began."""
        found = self.executing()
        with self._lock:
            now = self._revisions.get(node, 0)
        return f"{self._process} {now if found is None else found[0].revisions.get(node, now)}"

    def values(self, prompt: Prompt | None) -> dict[str, dict[str, Any]]:
        """The live values of this moment, by node."""
        if prompt is None:
            return {}
        with self._lock:
            return {node: dict(values) for node, values in prompt.values.items()}

    def begin(self, prompt: Prompt | None, node: str, run: Run) -> None:
        """A sampler's run begins: its log is in the prompt's, in place of what was remembered."""
        with self._lock:
            self._last.appendleft({"prompt_id": prompt and prompt.prompt_id, "finished": False, **run})
            if prompt is None:
                return
            for old in prompt.cached.pop(node, ()):
                prompt.log[:] = [run for run in prompt.log if run is not old]
            if not any(before["node"] == node for before in prompt.log):
                self._remembered.pop(prompt.results.get(node, ""), None)
            prompt.log.append(run)

    def end(self, prompt: Prompt | None, node: str, run: Run) -> None:
        """It has ended, and not failed."""
        with self._lock:
            for shown in self._last:
                if shown["evaluations"] is run["evaluations"]:
                    shown["finished"] = True
            if prompt is not None and (result := prompt.results.get(node)):
                self._remembered.setdefault(result, []).append(run)
                self._remembered.move_to_end(result)
                while len(self._remembered) > REMEMBERED:
                    self._remembered.popitem(last=False)

    def _enter(self, prompt_id: str) -> Prompt | None:
        item = next((item for item in self.running() if item[1] == prompt_id), None)
        if item is None:
            return None
        number, _, graph, extra_data, outputs, *_ = item
        known, log = self._prompt, planted(extra_data)
        # Clients may give one id to several prompts, their number too. Every prompt is planted a log of its own.
        if known is not None and (known.number, known.prompt_id) == (number, prompt_id) and known.planted is log:
            return known
        revisions = {node: self._revisions.get(node, 0) for node in graph}
        results = computed_from(graph, outputs, revisions)
        prompt = Prompt(
            number=number, prompt_id=prompt_id, planted=log, graph=graph, log=[] if log is None else log,
            revisions=revisions, results=results,
        )  # fmt: skip
        for node, result in results.items():
            runs = [{**run, "node": node} for run in self._remembered.get(result, ())]
            if runs:
                prompt.cached[node] = runs
                prompt.log.extend(runs)
        self._prompt = prompt
        return prompt

    # Of the event loop's

    def apply(self, nodes: Sequence[str], values: Mapping[str, Any], prompt_id: str | None) -> dict[str, Any]:
        """Live values for these nodes of the executing prompt. Raises ValueError for what no widget of them takes."""
        with self._lock:
            running = [item[1] for item in self.running()]
            prompt = self._enter(running[0]) if running else None
            here = prompt if prompt_id in (None, prompt and prompt.prompt_id) else None
            kinds = {node: here.graph[node]["class_type"] for node in nodes if here is not None and node in here.graph}
            check(values, set(kinds.values()))
            if here is not None and kinds:
                self._revision += 1
                for node in kinds:
                    here.values[node] = {**here.values.get(node, {}), **values}
                    self._revisions[node] = self._revision
            return {
                "applied": bool(kinds),
                "prompt_id": prompt and prompt.prompt_id,
                "revision": self._revision,
            }

    def last_runs(self) -> list[Run]:
        """The logs of the last runs, newest first."""
        with self._lock:
            return [{**run, "evaluations": list(run["evaluations"])} for run in self._last]


def check(values: Mapping[str, Any], kinds: set[str]) -> None:
    """Raises ValueError for a widget that one of `kinds` (none: all of the controls) does not have, or its value."""
    known = [KINDS[kind].live if kind in KINDS else {} for kind in kinds] if kinds else [
        {name: check for kind in KINDS.values() for name, check in kind.live.items()}
    ]  # fmt: skip
    for name, value in values.items():
        for live in known:
            if name not in live:
                raise ValueError(f"values has {name!r}; expected one of {', '.join(sorted(live)) or 'nothing'}.")
            try:
                live[name](value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None


def asked(body: bytes) -> tuple[list[str], dict[str, Any], str | None]:
    """Nodes, values and prompt of a request. Raises ValueError."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The body is not JSON: {error}") from None
    data = data if isinstance(data, dict) else {}
    nodes, values, prompt_id = data.get("nodes", []), data.get("values", {}), data.get("prompt_id")
    texts = isinstance(nodes, list) and all(isinstance(node, str) for node in nodes)
    if not texts or not 0 < len(nodes) <= MOST_NODES:
        raise ValueError('nodes is missing or wrong; expected a list of execution ids, such as ["5", "12:5"].')
    if not isinstance(values, dict) or not values:
        raise ValueError('values is missing or wrong; expected values by widget, such as {"top_k": 3}.')
    if prompt_id is not None and not isinstance(prompt_id, str):
        raise ValueError("prompt_id is no text; expected the id of a prompt, or none.")
    return nodes, values, prompt_id


LIVE = Live()


def register() -> None:
    """Routes and queue of the server, where there is one."""
    server = prompt_server()
    if server is None:
        return
    LIVE.running = executing
    server.add_on_prompt_handler(plant)

    @server.routes.post("/d2m/live")
    async def post_live(request: web.Request) -> web.Response:
        try:
            body = await request.read()
            if len(body) > MOST_BYTES:
                raise ValueError(f"The body has {len(body)} bytes; expected {MOST_BYTES} at most.")
            return web.json_response(LIVE.apply(*asked(body)))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)

    @server.routes.get("/d2m/log")
    async def get_log(request: web.Request) -> web.Response:
        return web.json_response({"runs": LIVE.last_runs()})
