import assert from "node:assert/strict";
import { test } from "node:test";

import { EXPERT_COLOURS, contrast, css, expertColour, inkOn, luminance, sequential } from "../../web/expert_map/palette.mjs";

test("the first twelve experts have the palette's own colours", () => {
  const hex = (rgb) => `#${rgb.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
  assert.deepEqual(EXPERT_COLOURS.map((_, expert) => hex(expertColour(expert))), EXPERT_COLOURS);
});

test("further experts have lighter, then darker versions of the same hues", () => {
  for (const expert of EXPERT_COLOURS.keys()) {
    const [base, light, dark] = [0, 1, 2].map((round) => luminance(expertColour(expert + 12 * round)));
    assert.ok(dark < base && base < light);
  }
});

test("the experts of the first three rounds all differ", () => {
  const colours = Array.from({ length: 36 }, (_, expert) => css(expertColour(expert)));
  assert.equal(new Set(colours).size, 36);
});

test("black on white has the largest contrast", () => {
  assert.equal(contrast([0, 0, 0], [255, 255, 255]), 21);
  assert.equal(contrast([255, 255, 255], [0, 0, 0]), 21);
});

test("numbers on an expert's colour are readable", () => {
  for (let expert = 0; expert < 36; expert++) {
    const colour = expertColour(expert);
    assert.ok(contrast(colour, inkOn(colour)) >= 4.5, `expert ${expert}`);
  }
});

test("shares get lighter as they grow, and end at the scale's ends", () => {
  const lightness = Array.from({ length: 21 }, (_, i) => luminance(sequential(i / 20)));
  assert.deepEqual(lightness, lightness.toSorted((a, b) => a - b));
  assert.deepEqual(sequential(-1), sequential(0));
  assert.deepEqual(sequential(2), [254, 232, 56]);
});
