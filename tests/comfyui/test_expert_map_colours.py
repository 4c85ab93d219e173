"""The widget and the drawing of the IMAGE output are two programs with one palette."""

from __future__ import annotations

import json
import re

from demo.in_process import Comfy
from tools.host import ROOT


def test_the_widget_and_the_image_output_have_the_same_colours(host: Comfy) -> None:
    palette = (ROOT / "web" / "expert_map" / "palette.mjs").read_text()
    drawing = host.module("nodes.expert_map.map_image")

    def constant(name: str) -> list[object]:
        written = re.search(rf"export const {name} = (\[.*?\]);", palette, re.DOTALL)
        assert written is not None
        found: list[object] = json.loads(re.sub(r",\s*\]", "]", written[1]))
        return found

    assert constant("EXPERT_COLOURS") == list(drawing.EXPERT_COLOURS)
    assert constant("ROUNDS") == [None if mix is None else [mix] * 3 for mix in drawing.ROUNDS]


def test_the_widget_and_the_image_output_make_weak_margins_equally_faint(host: Comfy) -> None:
    written = (ROOT / "web" / "expert_map" / "drawing.mjs").read_text()
    drawing = host.module("nodes.expert_map.map_image")
    assert f"const FAINTEST = {drawing.FAINTEST};" in written
    assert f"margin.length * {1 - drawing.FULL_QUANTILE:.2f}" in written
