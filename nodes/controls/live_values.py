"""Widget values that change while a prompt is sampled: their store, their routes, and the logs of the last runs.

A live value belongs to the prompt that is executing when it arrives and is forgotten with it; a pending prompt keeps
the values it was queued with. Every arrival gives the named nodes a new revision, which is part of their fingerprint.
So ComfyUI's cache never returns a result that was made under live values for other values, not even for those that
the prompt was queued with.

Routes run in the event loop's thread, samplers in the executor's.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from comfy_execution.utils import get_executing_context

from ...d2m_model.foreign import read_json
from ..prompt_graph import PromptGraph, result_digests
from ..prompt_server import RequestError, executing_items, prompt_server, read_body, with_json_errors
from .kinds import CONTROL_KINDS
from .metadata_log import PromptLog, RunLog, add_empty_log, find_log

_LAST_RUNS = 32
_REMEMBERED_RESULTS = 256  # results of samplers whose logs are kept, for prompts that get them from ComfyUI's cache
_MAX_NODES = 1000
_MAX_REQUEST = 200_000  # bytes


@dataclass(kw_only=True, slots=True)
class ExecutingPrompt:
    """The prompt that is executing, with its live values and its log."""

    number: float  # in the queue
    prompt_id: str
    metadata_log: PromptLog | None
    graph: PromptGraph
    log: list[RunLog]  # `metadata_log`; a list that goes into no image if there is none
    revisions: dict[str, int]  # of its nodes when it began
    digests: dict[str, str]  # by node, see result_digests
    live_values: dict[str, dict[str, Any]] = field(default_factory=dict)  # by node
    last_valid: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last live values that fitted the file
    warnings: set[str] = field(default_factory=set)
    cached: dict[str, list[RunLog]] = field(default_factory=dict)  # logs in `log` of nodes that have not run


class LiveStore:
    """The live values of the executing prompt, revisions of nodes, and logs of sampling runs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = secrets.token_hex(4)  # cache providers may keep results longer than this process lives
        self._revision = 0
        self._revisions: dict[str, int] = {}
        self._prompt: ExecutingPrompt | None = None
        self._remembered: OrderedDict[str, list[RunLog]] = OrderedDict()  # by digest of the sampler's result
        self._last: deque[RunLog] = deque(maxlen=_LAST_RUNS)
        self.executing_items: Callable[[], Sequence[tuple]] = tuple  # the queue's, see prompt_server.py

    # Called in the executor's thread

    def executing(self) -> tuple[ExecutingPrompt, str] | None:
        """Return the prompt and the id of the node that this thread executes; None without a server."""
        context = get_executing_context()
        if context is None:
            return None
        with self._lock:
            prompt = self._enter(context.prompt_id)
        return None if prompt is None else (prompt, context.node_id)

    def fingerprint(self, node: str) -> str:
        """Return a node's id and the revision that its live values had when the executing prompt began.

        The id goes with it, since ComfyUI's cache would hand a node the result of an equal one, which follows the other
        node's live values.
        """
        executing = self.executing()
        with self._lock:
            latest = self._revisions.get(node, 0)
        revision = latest if executing is None else executing[0].revisions.get(node, latest)
        return f"{self._process} {node} {revision}"

    def values(self, prompt: ExecutingPrompt | None) -> dict[str, dict[str, Any]]:
        """Return a copy of the prompt's live values, by node."""
        if prompt is None:
            return {}
        with self._lock:
            return {node: dict(values) for node, values in prompt.live_values.items()}

    def begin(self, prompt: ExecutingPrompt | None, node: str, run: RunLog) -> None:
        """Add the log of a sampler's run that begins to the prompt's, in place of a remembered one."""
        with self._lock:
            self._last.appendleft({"prompt_id": prompt and prompt.prompt_id, "finished": False, **run})
            if prompt is None:
                return
            for remembered in prompt.cached.pop(node, ()):
                prompt.log[:] = [run for run in prompt.log if run is not remembered]
            if not any(earlier["node"] == node for earlier in prompt.log):
                self._remembered.pop(prompt.digests.get(node, ""), None)
            prompt.log.append(run)

    def end(self, prompt: ExecutingPrompt | None, node: str, run: RunLog) -> None:
        """Note that a run has ended without failing, and remember its log for the sampler's cached result."""
        with self._lock:
            for shown in self._last:
                if shown["evaluations"] is run["evaluations"]:
                    shown["finished"] = True
            if prompt is not None and (digest := prompt.digests.get(node)):
                self._remembered.setdefault(digest, []).append(run)
                self._remembered.move_to_end(digest)
                while len(self._remembered) > _REMEMBERED_RESULTS:
                    self._remembered.popitem(last=False)

    def _enter(self, prompt_id: str) -> ExecutingPrompt | None:
        item = next((item for item in self.executing_items() if item[1] == prompt_id), None)
        if item is None:
            return None
        number, _, graph, extra_data, outputs, *_ = item
        current, log = self._prompt, find_log(extra_data)
        # Clients may give the same id, and even the same number, to several prompts. But every prompt has its own log.
        queued = (number, prompt_id)
        if current is not None and (current.number, current.prompt_id) == queued and current.metadata_log is log:
            return current
        revisions = {node: self._revisions.get(node, 0) for node in graph}
        digests = result_digests(graph, outputs, revisions)
        prompt = ExecutingPrompt(
            number=number, prompt_id=prompt_id, metadata_log=log, graph=graph, log=[] if log is None else log,
            revisions=revisions, digests=digests,
        )  # fmt: skip
        for node, digest in digests.items():
            runs = [{**run, "node": node} for run in self._remembered.get(digest, ())]
            if runs:
                prompt.cached[node] = runs
                prompt.log.extend(runs)
        self._prompt = prompt
        return prompt

    # Called in the event loop's thread

    def apply(self, nodes: Sequence[str], values: Mapping[str, Any], prompt_id: str | None) -> dict[str, Any]:
        """Set live values of these nodes of the executing prompt. Raises ValueError for a value that no widget takes."""
        with self._lock:
            executing = [item[1] for item in self.executing_items()]
            prompt = self._enter(executing[0]) if executing else None
            target = prompt if prompt_id in (None, prompt and prompt.prompt_id) else None
            kinds = {
                node: target.graph[node]["class_type"] for node in nodes if target is not None and node in target.graph
            }
            check_live_values(values, set(kinds.values()))
            if target is not None and kinds:
                self._revision += 1
                for node in kinds:
                    target.live_values[node] = {**target.live_values.get(node, {}), **values}
                    self._revisions[node] = self._revision
            return {
                "applied": bool(kinds),
                "prompt_id": prompt and prompt.prompt_id,
                "revision": self._revision,
            }

    def last_runs(self) -> list[RunLog]:
        """Return the logs of the last runs, newest first."""
        with self._lock:
            return [{**run, "evaluations": list(run["evaluations"])} for run in self._last]


def check_live_values(values: Mapping[str, Any], kinds: set[str]) -> None:
    """Check values by widget against each of these kinds of control; against all of them if `kinds` is empty.

    Raises ValueError for a widget that one of the kinds does not have, or for a value that the widget does not take.
    """
    if kinds:
        tables = [CONTROL_KINDS[kind].live if kind in CONTROL_KINDS else {} for kind in kinds]
    else:
        tables = [{name: check for kind in CONTROL_KINDS.values() for name, check in kind.live.items()}]
    for name, value in values.items():
        for checks in tables:
            if name not in checks:
                raise ValueError(f"values has {name!r}; expected one of {', '.join(sorted(checks)) or 'nothing'}.")
            try:
                checks[name](value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None


def parse_live_request(body: bytes) -> tuple[list[str], dict[str, Any], str | None]:
    """Return nodes, values and prompt id of a request. Raises ValueError."""
    try:
        data = read_json(body)
    except ValueError as error:
        raise ValueError(f"The body is not JSON: {error}") from None
    data = data if isinstance(data, dict) else {}
    nodes, values, prompt_id = data.get("nodes", []), data.get("values", {}), data.get("prompt_id")
    texts = isinstance(nodes, list) and all(isinstance(node, str) for node in nodes)
    if not texts or not 0 < len(nodes) <= _MAX_NODES:
        raise ValueError('nodes is missing or wrong; expected a list of execution ids, such as ["5", "12:5"].')
    if not isinstance(values, dict) or not values:
        raise ValueError('values is missing or wrong; expected values by widget, such as {"top_k": 3}.')
    if prompt_id is not None and not isinstance(prompt_id, str):
        raise ValueError("prompt_id is not a text; expected the id of a prompt, or none.")
    return nodes, values, prompt_id


LIVE = LiveStore()


@with_json_errors
async def post_live(request: web.Request) -> web.Response:
    try:
        return web.json_response(LIVE.apply(*parse_live_request(await read_body(request, _MAX_REQUEST))))
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(400, str(error)) from None


async def get_log(request: web.Request) -> web.Response:
    return web.json_response({"runs": LIVE.last_runs()})


def register() -> None:
    """Add the routes and the handler of prompts, and follow the server's queue, if ComfyUI runs a server."""
    server = prompt_server()
    if server is None:
        return
    LIVE.executing_items = executing_items
    server.add_on_prompt_handler(add_empty_log)
    server.routes.post("/d2m/live")(post_live)
    server.routes.get("/d2m/log")(get_log)
