"""ComfyUI's page, driven by tests. Widgets and nodes are those of the visible graph, root or subgraph."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Page, Response, expect

from demo.server import ApiGraph, ComfyServer
from tools.host import PACK_NAME

Workflow = dict[str, Any]
PATIENCE = 120_000  # ms, for a machine that has other things to do
expect.set_options(timeout=PATIENCE)
FIND = "app.canvas.graph.getNodeById(id).widgets.find(it => it.name === name)"  # a widget of the graph that is shown


class Comfy:
    """A page of a running ComfyUI, in one of the two renderers."""

    def __init__(self, server: ComfyServer, page: Page, vue: bool) -> None:
        self.server, self.page, self.vue = server, page, vue
        self.complaints: list[str] = []
        self.reusable = True
        page.set_default_timeout(PATIENCE)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self._complain(str(error) + (error.stack or "")))

    def _heard(self, message: ConsoleMessage) -> None:
        where = message.location.get("url", "")
        # The browser's own words on what a test wants refused, on a node that has not run, on a file that is not there, and
        # on a freed trace, which a page frees once more a minute after its node has gone.
        missing = "status of 404" in message.text and ("/d2m/cost?" in where or "/d2m/traces/" in where)
        refused = missing or "status of 400" in message.text
        if message.type in ("error", "warning") and not refused:
            self._complain(f"{message.text} {where}")

    def _complain(self, said: str) -> None:
        if PACK_NAME in said or "d2m" in said.lower():
            self.complaints.append(said)

    def open(self) -> None:
        """Load the page in this renderer, with an empty workflow."""
        settings = {
            "Comfy.VueNodes.Enabled": self.vue,
            "Comfy.TutorialCompleted": True,
            "Comfy.ApiGraph.CanvasInfo": False,
            "Comfy.Workflow.Persist": True,
            # Drawn by software, the canvas would keep a core busy.
            "LiteGraph.Canvas.MaximumFps": 20,
            "Comfy.Minimap.Visible": False,
        }
        self.server.post("/settings", settings)
        self.page.goto(self.server.address)
        self.wait_until_ready()
        self.js("() => app.graph.clear()")

    def start_anew(self) -> None:
        """Leave what an earlier test has done to this page: one empty workflow, no dialog, no prompt heard of."""
        self.page.keyboard.press("Escape")
        self.js(
            """async () => {
                const { workflow, command } = app.extensionManager;
                const before = [...workflow.openWorkflows];
                await command.execute('Comfy.NewBlankWorkflow');
                for (const it of before) await workflow.closeWorkflow(it);
                app.canvas.ds.reset();
                startedPrompts.length = endedPrompts.length = 0;
            }"""
        )
        self._wait_for_nodes(0)

    def wait_until_ready(self) -> None:
        self.page.wait_for_function("() => window.app?.extensionManager && window.app.canvas && window.app.rootGraph")
        self.page.wait_for_function("() => app.extensions.some(({ name }) => name === 'dense2moe')")
        self.page.wait_for_selector("#graph-canvas, canvas.graph-canvas, #graph-canvas-container", state="attached")
        self.page.wait_for_function("() => !document.querySelector('.p-blockui-document, #comfy-loading')")
        self.page.wait_for_function("() => app.extensionManager.workflow?.activeWorkflow?.activeState")
        self.js(  # after the pack's own listener, which has then heard of what is in the list
            """() => {
                window.startedPrompts = [];
                window.endedPrompts = [];
                app.api.addEventListener('execution_start', ({ detail }) => startedPrompts.push(detail.prompt_id));
                app.api.addEventListener('execution_success', ({ detail }) => endedPrompts.push(detail.prompt_id));
            }"""
        )

    def js(self, function: str, argument: Any = None) -> Any:
        return self.page.evaluate(function, argument)

    # nodes

    def load(self, workflow: Workflow) -> None:
        """Open a workflow as if its file were dropped on the page, and wait for it."""
        self.js("workflow => app.loadGraphData(workflow)", workflow)
        self._wait_for_nodes(len(workflow["nodes"]))

    def build(self, graph: ApiGraph) -> None:
        """Draw an API graph; nodes keep their ids, and seeds stay."""
        self.js(
            """graph => {
                app.loadApiJson(graph, 'test');
                for (const { widgets } of app.rootGraph.nodes)
                    for (const widget of widgets ?? [])
                        if (widget.name === 'control_after_generate') widget.value = 'fixed';
            }""",
            graph,
        )
        self._wait_for_nodes(len(graph))

    def _wait_for_nodes(self, count: int) -> None:
        """Wait until the graph has so many, and its tab, which follows a little later, as well."""
        self.page.wait_for_function(
            """count => {
                const { activeState } = app.extensionManager.workflow.activeWorkflow;
                return app.rootGraph.nodes.length === count && activeState?.nodes.length === count;
            }""",
            arg=count,
        )

    def workflow(self) -> Workflow:
        """Return the workflow that the page would save."""
        return dict(self.js("() => app.rootGraph.serialize()"))

    def into_subgraph(self, nodes: list[int], promote: tuple[int, str] | None = None) -> str:
        """Convert nodes to a subgraph, promoting a widget of one of them by linking it; the subgraph node's id.

        The page is not for another test then in ComfyUI 0.18.2 (Nodes 2.0): once a subgraph was opened, the next workflow
        that has one draws no nodes. Whether this pack has a part in it is not known.
        """
        release = self.server.get("/system_stats")["system"]["comfyui_version"]
        self.reusable = not (self.vue and release == "0.18.2")
        return str(
            self.js(
                """([ids, promote]) => {
                    const nodes = ids.map(id => app.rootGraph.getNodeById(id));
                    const { subgraph, node } = app.rootGraph.convertToSubgraph(new Set(nodes));
                    if (promote) {
                        const inner = subgraph.nodes.find(it => it.id == promote[0]);
                        const slot = inner.inputs.find(it => it.widget?.name === promote[1]);
                        subgraph.addInput(promote[1], slot.type).connect(slot, inner);
                    }
                    return node.id;
                }""",
                [nodes, promote],
            )
        )

    def keep(self) -> None:
        """Let the page write down what a reload finds, as it does after every change by a user."""
        self.js(
            "() => { const it = app.extensionManager.workflow.activeWorkflow.changeTracker;"
            " (it.captureCanvasState ?? it.checkState).call(it); }"
        )
        self.page.wait_for_timeout(1000)

    def prompt(self) -> dict[str, Any]:
        """The API graph that the page would queue, without the titles."""
        graph = self.js("async () => (await app.graphToPrompt()).output")
        return {key: {name: node[name] for name in ("inputs", "class_type")} for key, node in graph.items()}

    def value(self, node: int | str, name: str) -> Any:
        return self.js(f"([id, name]) => {FIND}.value", [node, name])

    def move_slider(self, node: int | str, name: str, to: int) -> None:
        """Move a slider of whole numbers as a user does: by the mouse on the canvas, by the keyboard in Nodes 2.0."""
        if self.vue:
            slider = self.page.locator(f'[data-node-id="{node}"]').get_by_role("slider").first
            while (steps := to - int(self.value(node, name))) != 0:
                slider.press("ArrowRight" if steps > 0 else "ArrowLeft")
        else:
            x, y = self.js(
                f"""([id, name, to]) => {{
                    const node = app.canvas.graph.getNodeById(id), widget = {FIND};
                    const {{ min, max }} = widget.options, width = node.size[0];
                    const at = [15 + (width - 30) * (to - min) / (max - min), widget.y + 10];
                    const [left, top] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + at[0], node.pos[1] + at[1]]);
                    const box = app.canvas.canvas.getBoundingClientRect();
                    return [left + box.left, top + box.top];
                }}""",
                [node, name, to],
            )
            self.page.mouse.click(x, y)
        self.page.wait_for_function(f"([id, name, to]) => {FIND}.value === to", arg=[node, name, to])

    def show_all(self) -> None:
        """Fit the graph into the window."""
        self.js("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(600)  # it glides

    def set_widget(self, node: int | str, name: str, value: Any) -> None:
        """Change a widget as its control does: the value, then its callback."""
        self.js(
            f"""([id, name, value]) => {{
                const widget = {FIND};
                widget.value = value;
                widget.callback?.(value, app.canvas, app.canvas.graph.getNodeById(id));
            }}""",
            [node, name, value],
        )

    def readout(self, node: int | str) -> str:
        return str(self.js("id => app.canvas.graph.getNodeById(id).widgets.at(-1).element.innerText", node))

    # runs

    @property
    def _gate(self) -> Path:
        return self.server.base

    def queue(self) -> str:
        """Press Run; the prompt's id."""
        with self.page.expect_response(lambda it: it.url.endswith("/prompt") and it.request.method == "POST") as answer:
            self.js("() => void app.queuePrompt(0, 1)")
        body = answer.value.json()
        assert answer.value.ok, json.dumps(body)
        return str(body["prompt_id"])

    def wait_at_gate(self) -> None:
        deadline = time.monotonic() + PATIENCE / 1000
        while not (self._gate / "waiting").exists():
            assert time.monotonic() < deadline, self.server.log_tail()
            self.page.wait_for_timeout(20)
        (self._gate / "waiting").unlink()

    def wait_until_started(self, prompt_id: str) -> None:
        """Wait until the page has heard that this prompt runs."""
        self.page.wait_for_function("id => startedPrompts.includes(id)", arg=prompt_id)

    def wait_until_ended(self, prompt_id: str) -> None:
        """Wait until the page has heard that this prompt has run, and what its nodes gave."""
        self.page.wait_for_function("id => endedPrompts.includes(id)", arg=prompt_id)

    def open_gate(self) -> None:
        (self._gate / "open").touch()

    def live(self, action: Callable[[], Any]) -> dict[str, Any]:
        """Return what the page sent, and the answer, when `action` changed a value during a run."""
        return self._live(action, lambda values: True)

    def slide_live(self, node: int | str, name: str, to: int) -> dict[str, Any]:
        """The same of a slider that is moved, once it stands: it is sent on the way, too."""
        return self._live(lambda: self.move_slider(node, name, to), lambda values: values == {name: to})

    def _live(self, action: Callable[[], Any], is_last: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        def matches(it: Response) -> bool:
            return it.url.endswith("/d2m/live") and is_last(it.request.post_data_json["values"])

        with self.page.expect_response(matches) as answer:
            action()
        return {"sent": answer.value.request.post_data_json, "status": answer.value.status, **answer.value.json()}

    def wait(self, prompt_id: str) -> dict[str, Any]:
        return self.server.wait(prompt_id, seconds=120)

    def open_gate_for_good(self) -> None:
        """Let a run end that a failed test has left at the gate."""
        if self.server.get("/queue")["queue_running"]:
            self.server.post("/interrupt", {})
            self.open_gate()
            deadline = time.monotonic() + 60
            while self.server.get("/queue")["queue_running"] and time.monotonic() < deadline:
                time.sleep(0.1)
        for name in ("open", "waiting"):
            (self._gate / name).unlink(missing_ok=True)
