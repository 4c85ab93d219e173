import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { clear, fits, isolate, weigh, weights } from "../../web/expert_map/rules.mjs";

// The mask node reads the same cases in tests/comfyui/test_controls.py.
const cases = JSON.parse(readFileSync(new URL("mask_rules.json", import.meta.url), "utf8"));

for (const [text, name, expected] of cases) {
  test(`rules weigh as the mask node reads them: ${JSON.stringify(text)} in ${name}`, () => {
    assert.deepEqual(weights(text, name, 3), expected);
  });
}

test("characters that only a regular expression reads specially stand for themselves", () => {
  assert.ok(!fits("single+blocks.3", "singleblocks.3"));
  assert.ok(fits("single+blocks.3", "single+blocks.3"));
  assert.ok(!fits("single_blocks.3", "single_blocksx3"));
  assert.ok(!fits("single_blocks.1", "single_blocks.12"));
});

test("a line that is no rule does not change a weight", () => {
  for (const text of ["# single_blocks.*: 1=0", "nonsense", "*: 1=-2", "*: one=0", "*: 1=x"]) {
    assert.deepEqual(weights(text, "single_blocks.0", 2), [1, 1], text);
  }
});

test("muting appends a rule, and muting another expert extends it", () => {
  const one = weigh("", "single_blocks.3", 5, 0);
  assert.equal(one, "single_blocks.3: 5=0");
  assert.equal(weigh(one, "single_blocks.3", 6, 0), "single_blocks.3: 5=0, 6=0");
});

test("a new weight replaces the expert's old one", () => {
  assert.equal(weigh("*: 1=0, 2=0", "*", 1, 2), "*: 2=0, 1=2");
});

test("a rule is written after those that it must override", () => {
  const text = weigh("single_blocks.3: 1=0\n*: 1=2", "single_blocks.3", 1, 0.5);
  assert.equal(text, "*: 1=2\nsingle_blocks.3: 1=0.5");
  assert.deepEqual(weights(text, "single_blocks.3", 2), [1, 0.5]);
});

test("isolating leaves one expert in place of the rule's other entries", () => {
  assert.equal(isolate("*: 3=0 # mine", "*", 2), "*: *=0, 2=1 # mine");
});

test("comments, and lines that the node will refuse, stay as the user wrote them", () => {
  const text = "# first\n*: 1=-2\nnonsense";
  assert.equal(weigh(text, "*", 0, 0), `${text}\n*: 0=0`);
});

test("clearing removes an expert from every rule on the given layers", () => {
  const text = "single_blocks.*: 1=0, 2=0\ndouble_blocks.*: 1=0";
  assert.equal(clear(text, ["single_blocks.0"], 1), "single_blocks.*: 2=0\ndouble_blocks.*: 1=0");
});

test("clearing removes a rule for all experts whole, but keeps its comment", () => {
  assert.equal(clear("*: *=0, 2=1 # only two", ["single_blocks.0"], 2), "# only two");
  assert.equal(clear("*: *=0, 2=1", ["single_blocks.0"], 2), "");
});
