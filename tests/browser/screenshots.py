"""Pictures of the pack in ComfyUI: `make screenshots`.

demo/out/screenshots/  every template as it opens, in both renderers and both themes: to look at
docs/workflow.jpg      the first template, painted (README)
docs/expert-map.jpg    the expert map of another, painted (README)
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from demo.models import OUT
from demo.server import ComfyServer
from demo.template_graphs import TEMPLATES
from tests.browser.driver import Comfy
from tools import browser as chromium
from tools.host import ROOT

FOLDER = OUT / "screenshots"
RENDERERS, THEMES = {"canvas": False, "nodes-2": True}, ("dark", "light")
PAINTED = {"workflow": "flux-moe-emoji", "expert-map": "flux-moe-expert-map"}
FILES = {template.name: f"{template.title}.json" for template in TEMPLATES}
EVALUATION = 12  # of the expert map: a step at which the outline stands and details form


def picture(page: Comfy) -> Image.Image:
    return Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")


def load(page: Comfy, name: str) -> None:
    """Open a template as it opens for a user, and let it settle."""
    page.load(json.loads((ROOT / "example_workflows" / FILES[name]).read_text()))
    page.page.wait_for_timeout(1500)


def painted(page: Comfy, name: str) -> Image.Image:
    load(page, name)
    page.wait(page.queue())
    page.page.wait_for_timeout(3000)  # the pictures load
    page.show_all()
    if name == "flux-moe-expert-map":
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
    return picture(page)


def opened(server: ComfyServer, browser: Browser, vue: bool, theme: str) -> Comfy:
    server.post("/settings", {"Comfy.ColorPalette": theme})
    context = browser.new_context(viewport={"width": 1600, "height": 1000}, locale="en-US")
    page = Comfy(server, context.new_page(), vue=vue)
    page.open()
    return page


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.needed(), args=["--no-sandbox"])
        for renderer, vue in RENDERERS.items():
            for theme in THEMES:
                page = opened(server, browser, vue, theme)
                for name in FILES:
                    load(page, name)
                    picture(page).save(FOLDER / f"{name}-{renderer}-{theme}.png")
                page.page.context.close()
        for file, name in PAINTED.items():
            page = opened(server, browser, True, "dark")
            painted(page, name).save(ROOT / "docs" / f"{file}.jpg", quality=85)
            page.page.context.close()
        browser.close()
    print(f"Every template, in both renderers and themes: {FOLDER}")


if __name__ == "__main__":
    main()
