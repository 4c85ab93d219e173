"""The loader, found by search."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.browser.driver import Comfy


def add_by_search(comfy: Comfy, display_name: str) -> None:
    """Double-click the canvas, type, and take the first that is found."""
    comfy.page.mouse.dblclick(700, 500)
    dialog = comfy.page.get_by_role("dialog").last
    expect(dialog).to_be_visible()
    comfy.page.keyboard.type(display_name)
    first = dialog.get_by_role("option").or_(dialog.get_by_test_id("result-item")).first
    expect(first).to_contain_text(display_name)
    comfy.page.keyboard.press("Enter")
    comfy.page.wait_for_function("() => app.rootGraph.nodes.length === 1")
    if comfy.js("() => app.rootGraph.nodes[0].flags.ghost"):
        expect(dialog).to_be_hidden()
        comfy.page.mouse.move(650, 450)  # it hangs on the mouse
        comfy.page.mouse.click(650, 450)
        comfy.page.wait_for_function("() => !app.rootGraph.nodes[0].flags.ghost")


def test_the_loader_is_found_by_search_and_added(comfy: Comfy) -> None:
    add_by_search(comfy, "Load FLUX-MoE")
    added = comfy.js("() => app.rootGraph.nodes.map(({ type, widgets }) => [type, widgets[0].options.values])")
    [[kind, offered]] = added
    assert kind == "D2MLoadFluxMoE"
    assert "emoji-flux-moe.safetensors" in offered
