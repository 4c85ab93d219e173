"""The palette of experts: told apart by everybody, and one for the widget and the drawing of the IMAGE output."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from demo.in_process import Comfy
from tools.host import ROOT

# Machado, Oliveira, Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
TO_LMS = np.array(
    [[0.41222147, 0.53633254, 0.05144599], [0.21190350, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.62997870]]
)  # fmt: skip
TO_LAB = np.array(
    [[0.21045426, 0.79361779, -0.00407205], [1.97799850, -2.42859221, 0.45059371], [0.02590404, 0.78277177, -0.80867577]]
)  # fmt: skip


@pytest.mark.parametrize("kind", BLINDNESS)
def test_twelve_experts_are_told_apart_with_every_kind_of_colour_blindness(host: Comfy, kind: str) -> None:
    """Distances in OKLab, where 0.02 is about the smallest visible difference. (Numbers in the regions tell the rest.)"""
    colours = np.array([host.module("nodes.expert_map.map_image").expert_colour(expert) for expert in range(12)]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ BLINDNESS[kind].T, 0, 1)
    lab = np.cbrt(seen @ TO_LMS.T) @ TO_LAB.T
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(12, 1)]
    assert distances.min() >= 0.02


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
