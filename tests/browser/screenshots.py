"""The README's pictures of ComfyUI: `python -m tests.browser.screenshots`.

docs/workflow.jpg: the first example workflow, painted. docs/expert-map.jpg: the expert map of another.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from demo.server import ComfyServer
from tests.browser.driver import Comfy
from tools import browser as chromium
from tools.host import ROOT

PICTURES = {"workflow": "flux-moe-emoji", "expert-map": "flux-moe-expert-map"}
EVALUATION = 12  # of the expert map: a step at which the outline stands and details form


def screenshot(page: Comfy, workflow: str) -> Image.Image:
    page.load(json.loads((ROOT / "example_workflows" / f"{workflow}.json").read_text()))
    page.wait(page.queue())
    page.page.wait_for_timeout(3000)  # the pictures load
    page.show_all()
    if workflow == "flux-moe-expert-map":
        node = page.js("() => app.rootGraph.nodes.find(node => node.comfyClass === 'D2MExpertMap').id")
        steps = page.page.locator(f'[data-node-id="{node}"]').get_by_role("slider", name="step", exact=False).first
        steps.focus()
        steps.press("Home")
        for _ in range(EVALUATION):
            steps.press("ArrowRight")
        page.js(
            """id => {
                const node = app.rootGraph.getNodeById(id), [x, y] = node.pos, [width, height] = node.size;
                app.canvas.ds.fitToBounds([x - 20, y - 50, width + 40, height + 70]);
                app.canvas.setDirty(true, true);
            }""",
            node,
        )
        page.page.wait_for_timeout(2000)
    return Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.needed(), args=["--no-sandbox"])
        for name, workflow in PICTURES.items():
            context = browser.new_context(viewport={"width": 1600, "height": 1000}, locale="en-US")
            page = Comfy(server, context.new_page(), vue=True)
            page.open()
            screenshot(page, workflow).save(ROOT / "docs" / f"{name}.jpg", quality=85)
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
