"""The Expert map's widget in a real browser, on a page of its own, with a run of which every choice is known."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.driver import PATIENCE
from tests.browser.synthetic_trace import NONE, PROMPT, SyntheticTrace
from tests.browser.widget_page import WidgetPage

PLACE = {"filename": "image.png", "subfolder": "", "type": "temp"}
SINGLE_3 = 8 + 3  # number of the layer single_blocks.3: after four double blocks of two


@pytest.fixture(scope="module")
def served() -> Iterator[WidgetPage]:
    page = WidgetPage()
    yield page
    page.close()


class Map:
    """The page, and what a user does on it."""

    def __init__(self, page: Page, served: WidgetPage) -> None:
        self.page, self.served = page, served
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(PATIENCE)

    def open(self, **parameters: Any) -> None:
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        self.page.goto(f"{self.served.address}/index.html?{query}")
        self.page.wait_for_function("() => window.made")

    def run(self, *traces: str, image: bool = True) -> None:
        """What the node's run sends."""
        images = [PLACE if image else None for _ in traces]
        output = {"traces": traces, "images": images, "batches": [[PLACE, PLACE] if image else [] for _ in traces]}
        self.page.evaluate("output => made.map.onExecuted({ d2m_map: [output] })", output)

    def wait(self) -> None:
        """Until the step in view is drawn."""
        expect(self.page.locator(".d2m-body")).to_be_visible()
        expect(self.page.locator(".d2m-map")).to_have_attribute("aria-busy", "false")
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

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
        url = self.stage.locator("canvas").evaluate("canvas => canvas.toDataURL()")
        raw = self.page.evaluate("url => fetch(url).then(r => r.arrayBuffer()).then(b => [...new Uint8Array(b)])", url)
        image = np.asarray(Image.open(io.BytesIO(bytes(raw))).convert("RGB")).astype(int)
        trace = next(iter(self.served.traces.values()))
        height, width = image.shape[:2]
        side = min(height / trace.height, width / trace.width)
        y = ((height - side * trace.height) / 2 + side * (np.arange(trace.height) + 0.5)).astype(int)
        x = ((width - side * trace.width) / 2 + side * (np.arange(trace.width) + 0.5)).astype(int)
        return image[np.ix_(y, x)]

    def said(self) -> str:
        """What a screen reader says of the patch at the keyboard's cursor."""
        return self.stage.locator(".d2m-cell").text_content() or ""

    def properties(self) -> dict[str, Any]:
        found: dict[str, Any] = self.page.evaluate("() => made.map.properties.d2m_map")
        return found

    def masks(self) -> list[str]:
        """What the mask widget's callback heard."""
        found: list[str] = self.page.evaluate("() => made.masks")
        return found


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


# What is shown


@pytest.mark.parametrize(
    ("step", "sample", "block", "layer"), [(1, 0, 7, SINGLE_3), (3, 1, 9, 8 + 5), (0, 0, 1, 2), (2, 1, 3, 6)]
)
def test_an_isolated_expert_covers_exactly_the_patches_that_it_is_the_best_of(
    one: Map, step: int, sample: int, block: int, layer: int
) -> None:
    one.page.get_by_label("Sample").select_option(str(sample))
    one.to("Step", step)
    one.to("Block", block)
    one.button("Numbers").click()
    one.to("Opacity of the overlay", 100)
    best = patches(one.served.traces["one"], step, sample, layer)
    expert = int(np.bincount(best.ravel()).argmax())
    one.page.locator(f'.d2m-expert[data-expert="{expert}"]').click()
    one.wait()
    near = np.abs(one.pixels() - rgb(hexes(one.page)[expert])).max(-1) <= 2
    assert np.array_equal(near, best == expert)


def test_without_isolation_every_patch_has_the_hue_of_its_best_expert(one: Map) -> None:
    one.run("one", image=False)
    one.wait()
    one.button("Numbers").click()
    one.to("Opacity of the overlay", 100)
    best = patches(one.served.traces["one"], 0, 0, SINGLE_3)
    margin = one.served.traces["one"].choices(0, 0, SINGLE_3)[2][-best.size :].reshape(best.shape)
    colours = np.array([rgb(colour) for colour in hexes(one.page)])
    # Where margins are widest the overlay is opaque: the colour is the expert's own, whatever the ground.
    sure = margin >= np.quantile(margin, 0.985)
    assert np.abs(one.pixels() - colours[best]).max(-1)[sure].max() <= 2


def test_hiding_the_overlay_leaves_the_image(one: Map) -> None:
    with_overlay = one.pixels()
    one.button("Overlay").click()
    one.wait()
    image = np.asarray(Image.open(io.BytesIO(one.served.image)).convert("RGB")).astype(int)
    at = ((np.arange(24) + 0.5) * image.shape[0] / 24).astype(int)
    assert np.abs(one.pixels() - image[np.ix_(at, at)]).max() < 24
    assert np.abs(with_overlay - image[np.ix_(at, at)]).max() > 60


@pytest.mark.parametrize(("block", "layer"), [(2, 4), (7, SINGLE_3)])
def test_the_path_names_the_experts_and_gates_of_the_patch_under_the_cursor(one: Map, block: int, layer: int) -> None:
    one.to("Block", block)
    one.to("Step", 1)
    one.stage.focus()
    one.page.keyboard.press("Control+Home")
    for key in ["ArrowDown"] * 4 + ["ArrowRight"] * 2 + ["Shift+ArrowRight"]:
        one.page.keyboard.press(key)
    experts_TK, gates_TK, _ = one.served.traces["one"].choices(1, 0, layer)
    token = len(experts_TK) - 24 * 24 + 4 * 24 + 10
    chosen = ", ".join(
        f"expert {expert} {round(gate / 255 * 100)} %"
        for expert, gate in zip(experts_TK[token], gates_TK[token], strict=True)
    )
    assert one.said() == f"patch row 5, column 11: {chosen}"
    expect(one.page.locator(".d2m-path-title")).to_contain_text("patch row 5, column 11")
    chips = one.page.locator(".d2m-path-chosen .d2m-chip")
    expect(chips).to_have_text([str(expert) for expert in experts_TK[token]])


def test_pointing_at_a_patch_shows_its_path_and_clicking_keeps_it(one: Map) -> None:
    box = one.stage.bounding_box()
    assert box is not None
    title = one.page.locator(".d2m-path-title")
    one.stage.hover(position={"x": box["width"] / 2 + 6, "y": box["height"] / 2 + 6})
    expect(title).to_contain_text("patch row 13, column 13")
    one.page.mouse.move(1390, 1090)
    expect(title).to_contain_text("Point at a patch")
    one.stage.click(position={"x": box["width"] / 2 + 6, "y": box["height"] / 2 + 6})
    one.page.mouse.move(1390, 1090)
    expect(title).to_contain_text("patch row 13, column 13")


def test_a_block_that_was_passed_by_is_said_to_be_and_shows_no_overlay(one: Map) -> None:
    assert not one.served.traces["one"].blocks(3, 0)[1][3]
    one.to("Step", 3)
    expect(one.page.locator(".d2m-note:visible")).to_have_text("single_blocks.3 did not run at this step")
    expect(one.slider("Block")).to_have_attribute("aria-valuetext", "single_blocks.3 did not run")


def test_words_carry_the_number_of_their_best_expert(one: Map) -> None:
    one.page.get_by_role("tab", name="Text tokens").click()
    experts_TK, _, _ = one.served.traces["one"].choices(0, 0, SINGLE_3)
    tokens = one.page.locator(".d2m-token")
    expect(tokens.locator("span")).to_have_text([piece.replace("▁", "") for piece in PROMPT])
    expect(tokens.locator("b")).to_have_text([str(expert) for expert in experts_TK[: len(PROMPT), 0]])
    expect(one.page.locator(".d2m-text")).to_contain_text("and 20 tokens of padding")
    one.to("Block", 1)  # a double block: its text has a layer of its own
    experts_TK, _, _ = one.served.traces["one"].choices(0, 0, 3)
    expect(tokens.locator("b")).to_have_text([str(expert) for expert in experts_TK[: len(PROMPT), 0]])


def test_a_new_map_begins_at_the_last_step_and_block(shown: Map) -> None:
    shown.served.add(SyntheticTrace("one"))
    shown.open()
    shown.run("one")
    shown.wait()
    expect(shown.slider("Step")).to_have_value("5")
    expect(shown.slider("Block")).to_have_attribute("aria-valuetext", "single_blocks.7")


def test_words_without_their_text_are_numbered(shown: Map) -> None:
    shown.served.add(SyntheticTrace("one", pieces=False, text=9))
    shown.open()
    shown.run("one")
    shown.wait()
    shown.page.get_by_role("tab", name="Text tokens").click()
    expect(shown.page.locator(".d2m-token span")).to_have_text([str(number) for number in range(1, 10)])


def test_tokens_that_no_expert_took_are_shown_as_such(shown: Map) -> None:
    class Uneven(SyntheticTrace):
        def choices(self, step: int, sample: int, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            experts_TK, gates_TK, margin_T = super().choices(step, sample, layer)
            experts_TK[::2] = NONE
            return experts_TK, gates_TK, margin_T

    shown.served.add(Uneven("one"))
    shown.open()
    shown.run("one")
    shown.wait()
    shown.page.get_by_role("tab", name="Text tokens").click()
    shown.to("Step", 0)
    expect(shown.page.locator(".d2m-token b").first).to_have_text("–")
    expect(shown.page.locator(".d2m-token").first).to_have_attribute("aria-label", "a: no expert")


# Where a click leads


def cell(chart: Locator, row: float, rows: int, column: float, columns: int) -> dict[str, float]:
    """Where a cell of a chart lies: the experts' numbers have the left 26 pixels."""
    box = chart.bounding_box()
    assert box is not None
    width, height = box["width"] - 28, box["height"] - 4
    return {"x": 26 + (column + 0.5) * width / columns, "y": 2 + (row + 0.5) * height / rows}


def test_a_cell_of_the_load_by_block_says_its_share_and_goes_there(one: Map) -> None:
    chart = one.page.get_by_role("grid", name="Load by block")
    place = cell(chart, 5, 12, 4 + 6, 12)
    chart.hover(position=place)
    load = one.served.traces["one"].load(0, 0, 8 + 6)
    said = f"single_blocks.6 · expert 5 · {load[5] / sum(load) * 100:.1f} %"
    expect(one.page.locator(".d2m-readout-text").first).to_have_text(said)
    chart.click(position=place)
    expect(one.slider("Block")).to_have_attribute("aria-valuetext", "single_blocks.6")


def test_a_cell_of_the_load_by_step_goes_to_the_step_also_by_keyboard(one: Map) -> None:
    chart = one.page.get_by_role("grid", name="Load by step")
    chart.click(position=cell(chart, 2, 12, 4, 6))
    one.wait()
    expect(one.slider("Step")).to_have_value("4")
    chart.focus()
    for key in ("ArrowLeft", "ArrowLeft", "Enter"):
        one.page.keyboard.press(key)
    one.wait()
    expect(one.slider("Step")).to_have_value("2")


def test_the_block_paths_go_to_step_and_block(one: Map) -> None:
    one.page.get_by_role("tab", name="Block paths").click()
    chart = one.page.get_by_role("grid", name="Blocks that ran, by step")
    chart.focus()
    one.page.keyboard.press("Control+Home")
    said = chart.locator(".d2m-cell")
    assert said.text_content() == "double_blocks.0 · step 1 of 6 · passed by"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        one.page.keyboard.press(key)
    assert said.text_content() == "double_blocks.2 · step 2 of 6 · ran"
    one.page.keyboard.press("Enter")
    one.wait()
    expect(one.slider("Step")).to_have_value("1")
    expect(one.slider("Block")).to_have_attribute("aria-valuetext", "double_blocks.2.img_mlp")


def test_the_column_of_the_path_leads_to_its_block(one: Map) -> None:
    one.stage.click()
    strip = one.page.get_by_role("grid", name="Path of a token through all blocks")
    strip.focus()
    one.page.keyboard.press("Home")
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        one.page.keyboard.press(key)
    expect(one.slider("Block")).to_have_attribute("aria-valuetext", "double_blocks.2.img_mlp")


def test_playing_goes_to_the_last_step_and_stops(one: Map) -> None:
    one.button("Play the steps").click()
    expect(one.button("Pause")).to_be_visible()
    expect(one.button("Play the steps")).to_be_visible()
    expect(one.slider("Step")).to_have_value("5")


# Two traces


def test_the_difference_is_the_share_of_patches_with_another_best_expert(two: Map) -> None:
    two.page.get_by_role("radio", name="Difference").click()
    traces = two.served.traces
    differs = patches(traces["one"], 0, 0, SINGLE_3) != patches(traces["two"], 0, 0, SINGLE_3)
    note = f"{differs.mean() * 100:.1f} % of the patches have another best expert"
    expect(two.page.locator(".d2m-note:visible")).to_have_text(note)


def test_two_maps_side_by_side_follow_the_same_sliders(two: Map) -> None:
    two.page.get_by_role("radio", name="Side by side").click()
    expect(two.page.locator(".d2m-stage:visible")).to_have_count(2)
    two.to("Step", 2)
    two.to("Block", 4 + 6)
    for number, name in enumerate(("one", "two")):
        stage = two.page.locator(".d2m-stage:visible").nth(number)
        stage.focus()
        two.page.keyboard.press("Control+Home")
        experts_TK, _, _ = two.served.traces[name].choices(2, 0, 8 + 6)
        assert f": expert {experts_TK[-24 * 24, 0]} " in (stage.locator(".d2m-cell").text_content() or "")


def test_maps_of_other_sizes_are_not_laid_over_one_another(shown: Map) -> None:
    shown.served.add(SyntheticTrace("one"))
    shown.served.add(SyntheticTrace("small", height=12, width=16, steps=4))
    shown.open()
    shown.run("one", "small")
    shown.wait()
    shown.to("Step", 5)  # which the other does not have
    shown.page.get_by_role("radio", name="Difference").click()
    expect(shown.page.locator(".d2m-note:visible")).to_contain_text("cannot be compared")
    shown.page.get_by_role("radio", name="Side by side").click()
    expect(shown.page.locator(".d2m-stage:visible")).to_have_count(2)


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
    expect(shown.button("Insert Expert mask")).to_be_visible()


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


def test_every_text_is_there_in_chinese(two: Map) -> None:
    english = two.page.locator(".d2m-map").inner_text()
    two.open(locale="zh")
    two.run("one", "two")
    two.wait()
    chinese = two.page.locator(".d2m-map").inner_text()
    assert "map." not in english + chinese
    untranslated = set(re.findall(r"[A-Za-z]{3,}", re.sub(r"[a-z]+_blocks", "", chinese)))
    assert untranslated <= {"Top", "PNG", "JSON", "token"}


# Keeping, freeing, failing


def test_a_reload_brings_back_trace_and_view(one: Map) -> None:
    one.to("Step", 2)
    one.page.get_by_role("tab", name="Text tokens").click()
    one.page.locator('.d2m-expert[data-expert="4"]').click()
    one.page.wait_for_function("() => JSON.parse(localStorage.workflow).d2m_map.view?.expert === 4")
    one.page.reload()
    one.page.wait_for_function("() => window.made")
    one.wait()
    expect(one.slider("Step")).to_have_value("2")
    expect(one.slider("Block")).to_have_attribute("aria-valuetext", "single_blocks.3")
    expect(one.page.get_by_role("tab", name="Text tokens")).to_have_attribute("aria-selected", "true")
    expect(one.page.locator('.d2m-expert[data-expert="4"]')).to_have_attribute("aria-selected", "true")


def test_a_freed_trace_says_what_to_do(one: Map) -> None:
    one.page.wait_for_function("() => localStorage.workflow")
    one.served.traces.clear()
    one.page.reload()
    expect(one.page.locator(".d2m-message")).to_contain_text("Run the workflow again")


def test_a_trace_freed_while_it_is_shown_says_so_and_a_new_run_shows_again(one: Map) -> None:
    one.served.traces.clear()
    one.slider("Step").evaluate("input => { input.value = 3; input.dispatchEvent(new Event('input')); }")
    expect(one.page.locator(".d2m-message")).to_contain_text("Run the workflow again")
    one.served.add(SyntheticTrace("new"))
    one.run("new")
    one.wait()
    expect(one.slider("Step")).to_have_value("3")  # the view is kept


def test_a_new_run_frees_the_trace_of_the_last_one(one: Map) -> None:
    one.served.add(SyntheticTrace("new"))
    with one.page.expect_request(lambda it: it.method == "DELETE" and it.url.endswith("/d2m/traces/one")):
        one.run("new")
    one.wait()
    assert "new" in one.served.traces


def test_a_trace_that_another_map_shows_is_not_freed(one: Map) -> None:
    one.served.add(SyntheticTrace("new"))
    one.page.evaluate(
        """() => {
            const other = Object.create(made.map);
            Object.assign(other, { properties: {}, widgets: [], onExecuted: undefined, onRemoved: undefined });
            for (const extension of made.app.extensions) extension.nodeCreated(other);
            other.onExecuted({ d2m_map: [{ traces: ['one'], images: [] }] });
            document.getElementById('node').replaceChildren(made.map.widgets.at(-1).element);
        }"""
    )
    one.run("new")
    one.wait()
    assert "one" in one.served.traces


def test_undo_of_an_edit_before_the_run_does_not_bring_back_the_freed_trace(one: Map) -> None:
    old = one.page.evaluate("() => structuredClone(made.map.properties)")
    one.served.add(SyntheticTrace("new"))
    one.run("new")
    one.wait()
    one.page.evaluate("old => { made.map.properties = old; made.map.onConfigure({}); }", old)
    one.wait()
    assert one.properties()["traces"] == ["new"]


@pytest.mark.parametrize("tab_left", [False, True], ids=["deleted", "workflow left"])
def test_a_trace_is_freed_with_its_node_but_not_while_another_tab_holds_the_workflow(
    shown: Map, tab_left: bool
) -> None:
    shown.served.add(SyntheticTrace("one"))
    shown.page.clock.install()
    shown.open()
    shown.run("one")
    expect(shown.page.locator(".d2m-body")).to_be_visible()
    shown.page.evaluate(
        """left => {
            const workflow = made.app.extensionManager.workflow;
            if (left) workflow.openWorkflows.push({ activeState: { nodes: [{ properties: made.map.properties }] } });
            made.map.onRemoved();
        }""",
        tab_left,
    )
    shown.page.clock.run_for(61_000)
    shown.page.evaluate("() => fetch('/api/i18n').then(it => it.text())")  # after anything that was sent before
    assert ("DELETE /d2m/traces/one" in shown.served.asked) is not tab_left


def test_bytes_of_another_length_are_refused_with_the_numbers(shown: Map) -> None:
    class Cut(SyntheticTrace):
        def step_bytes(self, step: int, sample: int) -> bytes:
            return super().step_bytes(step, sample)[:-1]

    shown.served.add(Cut("one"))
    shown.open()
    shown.run("one")
    length = len(SyntheticTrace("one").step_bytes(5, 0))
    expect(shown.page.locator(".d2m-message")).to_contain_text(f"{length - 1} bytes")


def test_a_trace_of_a_newer_version_is_refused(shown: Map) -> None:
    class Newer(SyntheticTrace):
        def described(self) -> dict[str, Any]:
            return {**super().described(), "version": 2}

    shown.served.add(Newer("one"))
    shown.open()
    shown.run("one")
    expect(shown.page.locator(".d2m-message")).to_contain_text("version 2")


def test_a_step_is_fetched_once(one: Map) -> None:
    for step in (1, 2, 1, 0, 2):
        one.to("Step", step)
    asked = [route for route in one.served.asked if "/steps/" in route]
    assert len(asked) == len(set(asked)) == 5  # the last, steps 0 to 2, and the one after


def test_flux_in_its_full_size_has_no_element_per_patch_and_keeps_no_more_than_allowed(shown: Map) -> None:
    class Full(SyntheticTrace):
        """Choices at random: only the size matters here."""

        def choices(self, step: int, sample: int, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            stream = self.layers[layer][1]
            tokens = {"img": 4096, "txt": 512, "joint": 4608}[stream]
            random = np.random.default_rng([step, layer])
            part = [random.integers(0, 12, (tokens, self.slots), np.uint8) for _ in range(2)]
            return part[0], part[1], random.integers(0, 255, tokens, np.uint8)

        def load(self, step: int, sample: int, layer: int) -> list[int]:
            return [100 + expert for expert in range(12)]

    trace = Full("full", height=64, width=64, doubles=19, singles=38, steps=50, text=512, samples=1)
    shown.served.add(trace)
    shown.open()
    shown.run("full")
    shown.wait()
    for step in range(0, 50, 7):
        shown.to("Step", step)
    assert shown.page.locator(".d2m-map *").count() < 400
    kept = shown.page.evaluate(
        """async () => {
            const { TraceStore } = await import('/extensions/pack/expert_map/trace.mjs');
            const { api } = await import('/scripts/api.js');
            const store = new TraceStore(api, 4 * 2 ** 20);
            const trace = await store.trace('full');
            for (let step = 0; step < 6; step++) await store.step(trace, step, 0);
            return { bytes: store.bytes, first: store.keptStep(trace, 0, 0), last: store.keptStep(trace, 5, 0) !== null };
        }"""
    )
    assert kept["bytes"] <= 4 * 2**20
    assert kept["first"] is None
    assert kept["last"]


# Export


def download(shown: Map, name: str) -> tuple[str, bytes]:
    with shown.page.expect_download() as info:
        shown.button(name).click()
    return info.value.suggested_filename, info.value.path().read_bytes()


def test_the_json_holds_the_choices_of_the_step_shown(one: Map) -> None:
    one.to("Step", 2)
    name, raw = download(one, "JSON")
    assert name == "expert-map-step3-single_blocks.3.json"
    shown = json.loads(raw)["traces"][0]["shown"]
    assert (shown["step"], shown["sample"]) == (2, 0)
    layer = shown["layers"][SINGLE_3]
    experts_TK, gates_TK, margin_T = one.served.traces["one"].choices(2, 0, SINGLE_3)
    assert layer["name"] == "single_blocks.3"
    assert layer["experts"] == experts_TK.ravel().tolist()
    assert layer["gates"] == gates_TK.ravel().tolist()
    assert layer["margin"] == margin_T.tolist()
    assert shown["layers"][8 + 2] is None  # passed by at this step


@pytest.mark.parametrize(("compare", "maps"), [("A", 1), ("Side by side", 2), ("Difference", 1)])
def test_the_png_holds_the_maps_in_view_and_a_legend(two: Map, compare: str, maps: int) -> None:
    two.page.get_by_role("radio", name=compare, exact=True).click()
    two.wait()
    name, raw = download(two, "PNG")
    assert name == "expert-map-step1-single_blocks.3.png"
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    assert image.width == 768 * maps
    assert image.height > 768
    legend = np.asarray(image)[768:].reshape(-1, 3)
    for colour in hexes(two.page):
        assert (legend == rgb(colour)).all(-1).any()


Weigh = Callable[[str, list[Any]], Any]


@pytest.fixture
def rules(shown: Map) -> Weigh:
    shown.open()
    return lambda name, arguments: shown.page.evaluate(
        "([name, args]) => import('/extensions/pack/expert_map/rules.mjs').then(it => it[name](...args))",
        [name, arguments],
    )


@pytest.mark.parametrize(
    ("text", "name", "weights"),
    [
        ("single_blocks.*: 1=0", "single_blocks.12", [1, 0, 1]),
        ("single_blocks.*: 1=0", "double_blocks.1.img_mlp", [1, 1, 1]),
        ("*: *=0, 2=1", "double_blocks.1.img_mlp", [0, 0, 1]),
        ("*: 0=0\nsingle_blocks.[13]: 0=.5", "single_blocks.3", [0.5, 1, 1]),
        ("single_blocks.?: 0=2 # twice", "single_blocks.3", [2, 1, 1]),
        ("single_blocks.[!3]: 0=2", "single_blocks.3", [1, 1, 1]),
        ("single+blocks.3: 0=2", "singleblocks.3", [1, 1, 1]),
    ],
)
def test_rules_weigh_as_the_mask_node_reads_them(rules: Weigh, text: str, name: str, weights: list[float]) -> None:
    assert rules("weights", [text, name, 3]) == weights
