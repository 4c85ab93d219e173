"""The example workflows in the real frontend."""

from __future__ import annotations

import json

import pytest

from demo.template_graphs import TEMPLATES
from tests.browser.driver import Comfy
from tools.host import PACK_NAME, ROOT

WORKFLOWS = ROOT / "example_workflows"
TITLES = {template.name: template.title for template in TEMPLATES}


@pytest.mark.parametrize("name", TITLES)
def test_a_workflow_gives_the_prompt_of_its_twin(comfy: Comfy, name: str) -> None:
    comfy.load(json.loads((WORKFLOWS / f"{TITLES[name]}.json").read_text()))
    assert comfy.prompt() == json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())


def test_a_template_opens_from_the_template_browser(comfy: Comfy) -> None:
    page = comfy.page
    page.get_by_role("button", name="Templates").first.click()
    dialog = page.get_by_role("dialog").last
    dialog.get_by_text(PACK_NAME, exact=True).click()
    cards = dialog.locator("[data-testid^='template-workflow-']")
    cards.first.wait_for()
    shown = [card.get_attribute("data-testid") for card in cards.all()]
    assert shown == [f"template-workflow-{title}" for title in TITLES.values()]
    card = dialog.get_by_test_id("template-workflow-1 First picture")
    picture = card.locator("img").first
    picture.scroll_into_view_if_needed()
    handle = picture.element_handle()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=handle)
    card.click()
    page.wait_for_function("() => app.rootGraph.nodes.some(({ type }) => type === 'D2MLoadFluxMoE')")
    assert comfy.prompt() == json.loads((WORKFLOWS / "api" / "flux-moe-emoji.json").read_text())
