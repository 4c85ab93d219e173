"""The Expert map's widget: rules for experts, keyboard, themes, sizes and languages."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.browser.map_page import Map
from tests.browser.synthetic_trace import SyntheticTrace

# Rules


def test_muting_writes_a_rule_and_tells_the_mask_node(one: Map) -> None:
    one.page.locator('.d2m-expert[data-expert="5"]').click()
    one.button("Mute").click()
    assert one.masks() == ["single_blocks.3: 5=0"]
    expect(one.page.locator('.d2m-expert[data-expert="5"]')).to_contain_text("×0")
    one.page.get_by_label("Blocks that the rule is for").select_option("kind")
    one.button("Boost").click()
    assert one.masks()[-1] == "single_blocks.3: 5=0\nsingle_blocks.*: 5=2"
    expect(one.page.locator('.d2m-expert[data-expert="5"]')).to_contain_text("×2")
    one.button("Clear").click()
    assert one.masks()[-1] == ""
    expect(one.page.locator('.d2m-expert[data-expert="5"]')).not_to_contain_text("×")


def test_isolating_mutes_all_others_of_the_layer_in_view(one: Map) -> None:
    one.to("Block", 1)
    one.page.get_by_role("radio", name="Text").click()
    one.page.locator('.d2m-expert[data-expert="2"]').click()
    one.button("Isolate").click()
    assert one.masks() == ["double_blocks.1.txt_mlp: *=0, 2=1"]
    expect(one.page.locator('.d2m-expert[data-expert="3"]')).to_contain_text("×0")
    expect(one.page.locator('.d2m-expert[data-expert="2"]')).not_to_contain_text("×")


def test_rules_of_the_user_stay_as_they_are(one: Map) -> None:
    written = "# mine\nsingle_blocks.*: 1=0.5  # half\nsingle_blocks.3: 5=3, 6=0\nnonsense"
    one.page.evaluate("text => { made.node(2).widgets[0].value = text; }", written)
    one.page.locator('.d2m-expert[data-expert="5"]').click()
    one.button("Mute").click()
    assert one.masks() == ["# mine\nsingle_blocks.*: 1=0.5 # half\nsingle_blocks.3: 6=0, 5=0\nnonsense"]


def test_without_a_mask_node_the_buttons_are_off_and_one_is_offered(shown: Map) -> None:
    shown.served.add(SyntheticTrace("one"))
    shown.open(**{"no-mask": 1})
    shown.run("one")
    shown.wait()
    shown.page.locator('.d2m-expert[data-expert="5"]').click()
    expect(shown.button("Mute")).to_be_disabled()
    expect(shown.button("Insert Expert Mask")).to_be_visible()


# Keyboard, themes, sizes, languages


def test_every_part_is_reached_by_tab_and_has_a_name(two: Map) -> None:
    names = []
    two.page.locator("body").evaluate("body => { body.tabIndex = -1; body.focus(); }")
    for _ in range(60):
        two.page.keyboard.press("Tab")
        found = two.page.evaluate(
            """() => {
                const it = document.activeElement;
                if (!it.closest('.d2m-map')) return null;
                const style = getComputedStyle(it);
                const label = it.getAttribute('aria-label') ?? it.innerText;
                return { label, role: it.getAttribute('role') ?? it.type, outline: style.outlineStyle };
            }"""
        )
        if found is None:
            break
        assert found["label"].strip(), found
        assert found["outline"] == "solid", found
        names.append(f"{found['role']} {found['label']}")
    assert len(names) == len(set(names))
    for part in ("radio A", "range Step", "range Block", "grid Patches of the image", "grid Load by block", "tab Load"):
        assert part in names
    assert sum(name.startswith("option expert") for name in names) == 1  # the arrows move among them


def test_arrow_keys_move_sliders_tabs_and_experts(one: Map) -> None:
    one.slider("Step").focus()
    one.page.keyboard.press("ArrowRight")
    one.wait()
    expect(one.slider("Step")).to_have_attribute("aria-valuetext", "step 2 of 6 · σ 0.833")
    one.page.get_by_role("tab", name="Load").focus()
    one.page.keyboard.press("ArrowRight")
    expect(one.page.get_by_role("grid", name="Blocks that ran, by step")).to_be_visible()
    one.page.locator('.d2m-expert[data-expert="0"]').focus()
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        one.page.keyboard.press(key)
    expect(one.page.locator('.d2m-expert[data-expert="2"]')).to_have_attribute("aria-selected", "true")


def test_keys_pressed_in_the_map_do_not_reach_comfyui(one: Map) -> None:
    one.page.evaluate("() => { window.heard = []; addEventListener('keydown', event => heard.push(event.key)); }")
    one.stage.focus()
    for key in ("Delete", "ArrowLeft", "q", "Control+Enter"):
        one.page.keyboard.press(key)
    assert one.page.evaluate("() => heard") == ["Control", "Enter"]


CONTRASTS = """() => {
    const probe = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const paint = (...colours) => {
        probe.clearRect(0, 0, 1, 1);
        for (const colour of colours) { probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1); }
        return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = rgb => rgb
        .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const found = [];
    for (const it of document.querySelectorAll('.d2m-map *')) {
        const own = [...it.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if (!own || it.tagName === 'OPTION' || it.disabled || !it.checkVisibility() || it.closest('.d2m-cell')) continue;
        const grounds = [];
        for (let at = it; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const ground = paint('#fff', ...grounds);
        const ink = paint(`rgb(${ground})`, getComputedStyle(it).color);
        const [light, dark] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
        found.push([(light + 0.05) / (dark + 0.05), it.className + ' ' + it.innerText.slice(0, 30)]);
    }
    return found;
}"""


@pytest.mark.parametrize("theme", ["dark-theme", ""])
@pytest.mark.parametrize("tab", ["Load", "Block paths", "Text tokens"])
def test_all_text_is_readable_in_the_theme(two: Map, theme: str, tab: str) -> None:
    two.page.evaluate("theme => { document.body.className = theme; }", theme)
    two.page.get_by_role("tab", name=tab).click()
    two.stage.click()
    two.page.locator('.d2m-expert[data-expert="3"]').click()
    two.wait()
    found = two.page.evaluate(CONTRASTS)
    assert len(found) > 30
    assert [entry for entry in found if entry[0] < 4.5] == []


def test_the_theme_is_followed_when_it_changes(one: Map) -> None:
    root = one.page.locator(".d2m-map")
    expect(root).to_have_attribute("data-dark", "")
    one.page.evaluate("() => { document.body.className = ''; }")
    expect(root).not_to_have_attribute("data-dark", "")


@pytest.mark.parametrize("size", [(360, 900), (430, 700), (680, 980), (1200, 700)])
def test_the_map_fits_its_node(two: Map, size: tuple[int, int]) -> None:
    two.page.evaluate("size => made.resize(...size)", size)
    for compare in ("A", "Side by side"):
        two.page.get_by_role("radio", name=compare, exact=True).click()
        two.wait()
        sizes = two.page.evaluate(
            """() => {
                const root = document.querySelector('.d2m-map').getBoundingClientRect();
                const over = [...document.querySelectorAll('.d2m-map *')]
                    .filter(it => it.checkVisibility() && !it.closest('.d2m-cells, .d2m-hidden'))
                    .filter(it => it.getBoundingClientRect().right > root.right + 0.5).map(it => it.className);
                const stage = document.querySelector('.d2m-stage').getBoundingClientRect();
                const canvas = document.querySelector('.d2m-stage canvas');
                return { over, side: Math.min(stage.width, stage.height), drawn: [canvas.width, stage.width] };
            }"""
        )
        assert sizes["over"] == []
        assert sizes["side"] >= 120
        assert abs(sizes["drawn"][0] - sizes["drawn"][1]) <= 1


@pytest.mark.parametrize("size", [(640, 560), (680, 980)])
def test_block_paths_cover_nothing_and_their_last_row_can_be_reached(one: Map, size: tuple[int, int]) -> None:
    """A group has as many rows as blocks, more than a low node has room for."""
    one.page.evaluate("size => made.resize(...size)", size)
    one.page.get_by_role("tab", name="Block paths").click()
    one.wait()
    boxes = one.page.evaluate(
        """() => {
            const find = (selector) => document.querySelector(selector);
            const cells = find('.d2m-blocks'), hint = find('.d2m-chart:has(.d2m-blocks) + .d2m-quiet');
            const part = cells.closest('.d2m-charts'), whole = part.closest('.d2m-tabbed');
            part.scrollTop = part.scrollHeight;
            const [above, below, around, tab] = [cells, hint, part, whole].map(it => it.getBoundingClientRect());
            return { apart: below.top - above.bottom, end: around.bottom - below.bottom, room: tab.bottom - around.bottom };
        }"""
    )
    assert min(boxes.values()) >= -1


def test_every_text_is_there_in_chinese(two: Map) -> None:
    english = two.page.locator(".d2m-map").inner_text()
    two.open(locale="zh")
    two.run("one", "two")
    two.wait()
    chinese = two.page.locator(".d2m-map").inner_text()
    assert "map." not in english + chinese
    untranslated = set(re.findall(r"[A-Za-z]{3,}", re.sub(r"[a-z]+_blocks", "", chinese)))
    assert untranslated <= {"Top", "PNG", "JSON", "token"}
