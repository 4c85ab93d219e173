"""What a test does in ComfyUI's page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Page, expect

from demo.server import ComfyServer
from tools.host import PACK_NAME

Workflow = dict[str, Any]


class Comfy:
    """A page of a running ComfyUI, in one of the two renderers."""

    def __init__(self, server: ComfyServer, page: Page, vue: bool) -> None:
        self.server, self.page, self.vue = server, page, vue
        self.complaints: list[str] = []
        page.set_default_timeout(30_000)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self._complain(str(error) + (error.stack or "")))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._complain(f"{message.text} {message.location.get('url', '')}")

    def _complain(self, said: str) -> None:
        if PACK_NAME in said or "d2m" in said.lower():
            self.complaints.append(said)

    def open(self) -> None:
        """Load the page in this renderer, with an empty workflow."""
        settings = {
            "Comfy.VueNodes.Enabled": self.vue,
            "Comfy.TutorialCompleted": True,
            "Comfy.Graph.CanvasInfo": False,
            "Comfy.Workflow.Persist": True,
        }
        self.server.post("/settings", settings)
        self.page.goto(self.server.address)
        self.wait_until_ready()
        self.js("() => app.graph.clear()")

    def wait_until_ready(self) -> None:
        self.page.wait_for_function("() => window.app?.extensionManager && window.app.canvas && window.app.rootGraph")
        self.page.wait_for_function("() => app.extensions.some(({ name }) => name === 'dense2moe')")
        self.page.wait_for_selector("#graph-canvas, canvas.graph-canvas, #graph-canvas-container", state="attached")
        self.page.wait_for_function("() => !document.querySelector('.p-blockui-document, #comfy-loading')")

    def js(self, function: str, argument: Any = None) -> Any:
        return self.page.evaluate(function, argument)

    # nodes

    def load(self, workflow: Workflow) -> None:
        """Open a workflow as if its file were dropped on the page, and wait for it."""
        self.js("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_function("count => app.rootGraph.nodes.length === count", arg=len(workflow["nodes"]))

    def prompt(self) -> dict[str, Any]:
        """The API graph that the page would queue, without the titles."""
        graph = self.js("async () => (await app.graphToPrompt()).output")
        return {key: {name: node[name] for name in ("inputs", "class_type")} for key, node in graph.items()}

    def set_widget(self, node: int | str, name: str, value: Any) -> None:
        """Change a widget as its control does: the value, then its callback."""
        self.js(
            """([id, name, value]) => {
                const node = app.rootGraph.getNodeById(id);
                const widget = node.widgets.find(it => it.name === name);
                widget.value = value;
                widget.callback?.(value, app.canvas, node);
            }""",
            [node, name, value],
        )

    def readout(self, node: int | str) -> str:
        return str(self.js("id => app.rootGraph.getNodeById(id).widgets.at(-1).element.innerText", node))

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
        deadline = time.monotonic() + 60
        while not (self._gate / "waiting").exists():
            assert time.monotonic() < deadline, self.server.log_tail()
            self.page.wait_for_timeout(20)
        (self._gate / "waiting").unlink()

    def open_gate(self) -> None:
        (self._gate / "open").touch()

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


__all__ = ["Comfy", "Workflow", "expect"]
