"""A ComfyUI with this pack, and a real browser on it: every test that asks for `comfy` runs in both renderers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from demo.server import ComfyServer
from tests.browser.driver import Comfy
from tests.browser.map_page import Map
from tests.browser.synthetic_trace import SyntheticTrace
from tests.browser.widget_page import WidgetPage
from tests.comfyui.serving import EMOJI
from tests.toys import files
from tools import browser as chromium

RENDERERS = {"canvas": False, "nodes-2": True}

# A model behind this node stops in evaluation `stop_at` until the test opens the gate: what the test does meanwhile is for
# the next evaluation, on a machine of any speed. Another `test` is another run, whatever ComfyUI has in its cache.
GATE = """
import pathlib, time

class Gate:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "stop_at": ("INT", {}), "test": ("INT", {})}}

    def patch(self, model, stop_at, test):
        base, seen = pathlib.Path(__file__).parent.parent, 0

        def wrapper(apply, arguments):
            nonlocal seen
            seen += 1
            if seen == stop_at:
                (base / "waiting").touch()
                deadline = time.monotonic() + 300
                while not (base / "open").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                (base / "open").unlink(missing_ok=True)
            return apply(arguments["input"], arguments["timestep"], **arguments["c"])

        clone = model.clone()
        clone.set_model_unet_function_wrapper(wrapper)
        return (clone,)

NODE_CLASS_MAPPINGS = {"TestGate": Gate}
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("browser-server")
    models = base / "models" / "diffusion_models"
    dense = files.dense_flux(EMOJI)
    files.save(dense, models / "teacher.safetensors")
    files.save(files.split(dense, EMOJI), models / "emoji-flux-moe.safetensors")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "gate.py").write_text(GATE)
    with ComfyServer(base) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, one per module, since an idle page keeps drawing."""
    program = chromium.needed()
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, nor in many containers; what is opened here is ours.
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


FAILED = pytest.StashKey[bool]()


class Pages:
    """One page at a time, since loading it takes longer than most tests: it is used on in the same renderer, emptied, as
    long as all goes well."""

    def __init__(self, server: ComfyServer, browser: Browser) -> None:
        self._server, self._browser = server, browser
        self._open: Comfy | None = None

    def take(self, vue: bool) -> Comfy:
        """ComfyUI's page with an empty workflow."""
        if self._open is not None and self._open.vue == vue:
            self._open.start_anew()
            return self._open
        self.close()
        context = self._browser.new_context(viewport={"width": 1600, "height": 1000}, locale="en-US")
        self._open = Comfy(self._server, context.new_page(), vue=vue)
        self._open.open()
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open.page.context.close()
            self._open = None


@pytest.fixture(scope="module")
def pages(server: ComfyServer, browser: Browser) -> Iterator[Pages]:
    opened = Pages(server, browser)
    yield opened
    opened.close()


@pytest.fixture(scope="session", params=RENDERERS.values(), ids=RENDERERS)
def vue(request: pytest.FixtureRequest) -> bool:
    """True if Nodes 2.0 draws. Session scope puts all tests of one renderer in a row."""
    return bool(request.param)


@pytest.fixture
def comfy(request: pytest.FixtureRequest, pages: Pages, vue: bool, tmp_path: Path) -> Iterator[Comfy]:
    """ComfyUI's page with an empty workflow; a console message of our files that is no plain log fails the test."""
    opened = pages.take(vue)
    failed = True
    try:
        yield opened
        if failed := request.node.stash.get(FAILED, False):
            opened.page.screenshot(path=tmp_path / "failed.png")
            print(f"screenshot: {tmp_path / 'failed.png'}")
    finally:
        opened.open_gate_for_good()
        if failed or opened.complaints or not opened.reusable:
            pages.close()
    assert opened.complaints == []


# The Expert map's widget by itself: see map_page.py


@pytest.fixture(scope="module")
def served() -> Iterator[WidgetPage]:
    page = WidgetPage()
    yield page
    page.close()


@pytest.fixture
def shown(browser: Browser, served: WidgetPage) -> Iterator[Map]:
    served.traces.clear()
    served.asked.clear()
    context = browser.new_context(viewport={"width": 1400, "height": 1100}, device_scale_factor=1)
    opened = Map(context.new_page(), served)
    try:
        yield opened
    finally:
        context.close()
    assert opened.errors == []


@pytest.fixture
def one(shown: Map) -> Map:
    """A run of one trace, at its first step, in single_blocks.3."""
    shown.served.add(SyntheticTrace("one"))
    shown.open()
    shown.run("one")
    shown.wait()
    shown.to("Step", 0)
    shown.to("Block", 4 + 3)
    return shown


@pytest.fixture
def two(shown: Map) -> Map:
    shown.served.add(SyntheticTrace("one"))
    shown.served.add(SyntheticTrace("two", seed=1))
    shown.open()
    shown.run("one", "two")
    shown.wait()
    shown.to("Step", 0)
    shown.to("Block", 4 + 3)
    return shown
