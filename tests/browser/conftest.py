"""A ComfyUI with this pack, and a real browser on it: every test that asks for `comfy` runs in both renderers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.server import ComfyServer
from tests.browser.driver import Comfy
from tests.browser.map_page import Map
from tests.browser.pages import Pages
from tests.browser.synthetic_trace import SyntheticTrace
from tests.browser.widget_page import WidgetPage
from tests.comfyui.serving import EMOJI
from tests.toys import files

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
    # Server and page start sooner without the nodes of online services.
    with ComfyServer(base, arguments=("--cpu", "--disable-api-nodes")) as running:
        yield running


PAGES = pytest.StashKey[Pages]()


@pytest.fixture
def pages(pytestconfig: pytest.Config) -> Pages:
    return pytestconfig.stash.setdefault(PAGES, Pages())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Close the browser after the last test of this folder."""
    try:
        return (yield)
    finally:
        pages = item.config.stash.get(PAGES, None)
        if pages is not None and (nextitem is None or nextitem.path.parent != item.path.parent):
            pages.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session", params=RENDERERS.values(), ids=RENDERERS)
def vue(request: pytest.FixtureRequest) -> bool:
    """True if Nodes 2.0 draws. Session scope puts all tests of one renderer in a row."""
    return bool(request.param)


@pytest.fixture
def comfy(
    request: pytest.FixtureRequest, pages: Pages, server: ComfyServer, vue: bool, tmp_path: Path
) -> Iterator[Comfy]:
    """ComfyUI's page with an empty workflow; a console message of our files that is no plain log fails the test."""
    opened = pages.comfy(server, vue)
    failed = True
    try:
        yield opened
        if failed := request.node.stash.get(FAILED, False):
            opened.page.screenshot(path=tmp_path / "failed.png")
            print(f"screenshot: {tmp_path / 'failed.png'}")
    finally:
        opened.open_gate_for_good()
        if failed or opened.complaints or not opened.reusable:
            pages.close_page()
    assert opened.complaints == []


# The Expert map's widget by itself: see map_page.py


@pytest.fixture(scope="session")
def served() -> Iterator[WidgetPage]:
    page = WidgetPage()
    yield page
    page.close()


@pytest.fixture
def shown(request: pytest.FixtureRequest, pages: Pages, served: WidgetPage) -> Iterator[Map]:
    opened = pages.map(served)
    yield opened
    if request.node.stash.get(FAILED, False) or opened.errors or not opened.reusable:
        pages.close_page()
    assert opened.errors == []


ONE, TWO = SyntheticTrace("one"), SyntheticTrace("two", seed=1)


@pytest.fixture
def one(shown: Map) -> Map:
    """A run of one trace, at its first step, in single_blocks.3."""
    shown.served.add(ONE)
    shown.open()
    with shown.page.expect_response("**/view?*"):  # the image
        shown.run("one")
    shown.wait()
    shown.to("Step", 0)
    shown.to("Block", 4 + 3)
    return shown


@pytest.fixture
def two(shown: Map) -> Map:
    shown.served.add(ONE)
    shown.served.add(TWO)
    shown.open()
    shown.run("one", "two")
    shown.wait()
    shown.to("Step", 0)
    shown.to("Block", 4 + 3)
    return shown
