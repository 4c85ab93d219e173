"""The loader, found by search, and what the nodes say of costs."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from tests.browser.driver import Comfy


def add_by_search(comfy: Comfy, words: str, display_name: str) -> None:
    comfy.page.mouse.dblclick(700, 500)
    dialog = comfy.page.get_by_role("dialog").last
    expect(dialog).to_be_visible()
    comfy.page.keyboard.type(words)
    dialog.get_by_text(re.compile(f"^{re.escape(display_name)}$")).first.click()
    if comfy.js("() => app.rootGraph.nodes.some(node => node.flags.ghost)"):
        comfy.page.mouse.click(700, 500)  # where the mouse carries it


def test_the_loader_is_found_by_search_and_added(comfy: Comfy) -> None:
    add_by_search(comfy, "dense2moe", "Load FLUX-MoE")
    comfy.page.wait_for_function("() => app.rootGraph.nodes.length === 1")
    added = comfy.js("() => app.rootGraph.nodes.map(({ type, widgets }) => [type, widgets[0].options.values])")
    [[kind, offered]] = added
    assert kind == "D2MLoadFluxMoE"
    assert "emoji-flux-moe.safetensors" in offered
    assert not comfy.js("() => app.rootGraph.nodes[0].flags.ghost")
