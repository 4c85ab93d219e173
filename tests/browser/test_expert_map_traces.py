"""The Expert map's widget: traces are kept over a reload, freed when nobody shows them, and refused when they are wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.browser.map_page import Map
from tests.browser.synthetic_trace import SyntheticTrace


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
    shown.reusable = False  # the page keeps this clock
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
