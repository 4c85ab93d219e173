"""A page with the Expert map's widget alone, and a run of which every choice is known: what tests do on it."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page

from tests.browser.driver import PATIENCE
from tests.browser.synthetic_trace import SyntheticTrace
from tests.browser.widget_page import WidgetPage

PLACE = {"filename": "image.png", "subfolder": "", "type": "temp"}
# playwright looks at this in every frame, where its expect() waits for up to a second between two looks.
DRAWN = """() => {
    const map = document.querySelector('.d2m-map'), body = map?.querySelector('.d2m-body');
    return body?.checkVisibility() && map.getAttribute('aria-busy') === 'false';
}"""
OUTSIDE = (1390, 1090)  # where the mouse points at nothing
SINGLE_3 = 8 + 3  # number of the layer single_blocks.3: after four double blocks of two


class Map:
    """The page, and what a user does on it."""

    def __init__(self, page: Page, served: WidgetPage) -> None:
        self.page, self.served = page, served
        self.errors: list[str] = []
        self.reusable = True
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(PATIENCE)

    def start_anew(self) -> None:
        """Leave what an earlier test has done to this page and its server."""
        if self.page.url.startswith(self.served.address):
            self.page.evaluate("() => localStorage.clear()")
            self.page.goto("about:blank")
            self.page.mouse.move(*OUTSIDE)
        self.errors.clear()
        self.served.traces.clear()
        self.served.asked.clear()

    def open(self, **parameters: Any) -> None:
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        self.page.goto(f"{self.served.address}/index.html?{query}")
        self.page.wait_for_function("() => window.made")

    def run(self, *traces: str, image: bool = True) -> None:
        """Send what a run of the node sends."""
        images = [PLACE if image else None for _ in traces]
        output = {"traces": traces, "images": images, "batches": [[PLACE, PLACE] if image else [] for _ in traces]}
        self.page.evaluate("output => made.map.onExecuted({ d2m_map: [output] })", output)

    def wait(self) -> None:
        """Until the step in view is drawn."""
        # A change shows in the next frame, as busy if it is waited for.
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.wait_for_function(DRAWN)

    @property
    def stage(self) -> Locator:
        return self.page.locator(".d2m-stage:visible").first

    def slider(self, name: str) -> Locator:
        return self.page.get_by_role("slider", name=name, exact=True)

    def to(self, name: str, value: float) -> None:
        self.slider(name).evaluate(
            "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
        )
        self.wait()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def pixels(self) -> np.ndarray:
        """The middle of every patch of the map on the screen, [height, width, 3]."""
        url: str = self.stage.locator("canvas").evaluate("canvas => canvas.toDataURL()")
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)
        trace = next(iter(self.served.traces.values()))
        height, width = image.shape[:2]
        side = min(height / trace.height, width / trace.width)
        y = ((height - side * trace.height) / 2 + side * (np.arange(trace.height) + 0.5)).astype(int)
        x = ((width - side * trace.width) / 2 + side * (np.arange(trace.width) + 0.5)).astype(int)
        return image[np.ix_(y, x)]

    def said(self) -> str:
        """Return what a screen reader says about the patch at the keyboard's cursor."""
        return self.stage.locator(".d2m-cell").text_content() or ""

    def properties(self) -> dict[str, Any]:
        found: dict[str, Any] = self.page.evaluate("() => made.map.properties.d2m_map")
        return found

    def masks(self) -> list[str]:
        """Return the values that the mask widget's callback received."""
        found: list[str] = self.page.evaluate("() => made.masks")
        return found


def patches(trace: SyntheticTrace, step: int, sample: int, layer: int) -> np.ndarray:
    """The best expert of every patch, [height, width]."""
    experts_TK, _, _ = trace.choices(step, sample, layer)
    return experts_TK[-trace.height * trace.width :, 0].reshape(trace.height, trace.width)


def hexes(page: Page) -> list[str]:
    found: list[str] = page.evaluate(
        "() => import('/extensions/pack/expert_map/palette.mjs').then(it => it.EXPERT_COLOURS)"
    )
    return found


def rgb(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
