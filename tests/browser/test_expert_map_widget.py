"""The Expert map's widget in a real browser, on a page of its own: what it shows of a run of which every choice is known,
and where a click leads."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, expect

from tests.browser.map_page import OUTSIDE, SINGLE_3, Map, hexes, patches, rgb
from tests.browser.synthetic_trace import NONE, PROMPT, SyntheticTrace

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
    one.page.mouse.move(*OUTSIDE)
    expect(title).to_contain_text("Point at a patch")
    one.stage.click(position={"x": box["width"] / 2 + 6, "y": box["height"] / 2 + 6})
    one.page.mouse.move(*OUTSIDE)
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
    """Return the position of a cell in a chart, whose left 26 pixels show the experts' numbers."""
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
