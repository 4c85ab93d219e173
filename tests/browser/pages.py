"""The browser of the tests and the page in it, used on by later tests: to start them takes longer than most tests."""

from __future__ import annotations

from playwright.sync_api import Browser, Page, Playwright, ViewportSize, sync_playwright

from demo.server import ComfyServer
from tests.browser.driver import Comfy
from tests.browser.map_page import Map
from tests.browser.widget_page import WidgetPage
from tools import browser as chromium


class Pages:
    """One page at a time, since an idle page keeps drawing."""

    def __init__(self) -> None:
        self._playwright: Playwright | None = None
        self._browser: Browser | None = None
        self._page: Page | None = None
        self._comfy: Comfy | None = None
        self._map: Map | None = None

    def comfy(self, server: ComfyServer, vue: bool) -> Comfy:
        """ComfyUI's page with an empty workflow, in this renderer."""
        known, self._comfy = self._comfy, None  # until it is ready
        if known is not None and known.vue == vue:
            known.start_anew()
        else:
            known = Comfy(server, self._new(ViewportSize(width=1600, height=1000)), vue=vue)
            known.open()
        self._comfy = known
        return known

    def map(self, served: WidgetPage) -> Map:
        """The page for the Expert map's widget by itself, see map_page.py."""
        known, self._map = self._map, None
        if known is None:
            known = Map(self._new(ViewportSize(width=1400, height=1100)), served)
        known.start_anew()
        self._map = known
        return known

    def _new(self, viewport: ViewportSize) -> Page:
        """A blank page that knows nothing of earlier ones."""
        self.close_page()
        context = self._started().new_context(viewport=viewport, device_scale_factor=1, locale="en-US")
        self._page = context.new_page()
        return self._page

    def _started(self) -> Browser:
        if self._browser is None:
            program = chromium.needed()
            self._playwright = sync_playwright().start()
            # Chromium's sandbox does not work for root, nor in many containers; what is opened here is ours.
            self._browser = self._playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        return self._browser

    def close_page(self) -> None:
        if self._page is not None:
            self._page.context.close()
        self._page = self._comfy = self._map = None

    def close(self) -> None:
        """Close the browser and end playwright's event loop, beside which asyncio.run() fails."""
        self.close_page()
        if self._browser is not None:
            self._browser.close()
        if self._playwright is not None:
            self._playwright.stop()
        self._browser = self._playwright = None
