import assert from "node:assert/strict";
import { test } from "node:test";

import { contain, fullMargin, regionLabels } from "../../web/expert_map/drawing.mjs";

test("a map keeps its proportions in the middle of its place", () => {
  assert.deepEqual(contain(200, 100, 1), { x: 50, y: 0, width: 100, height: 100 });
  assert.deepEqual(contain(100, 100, 2), { x: 0, y: 25, width: 100, height: 50 });
});

test("the overlay is opaque at the margin that all but the widest 2 % stay below", () => {
  const margins = Uint8Array.from({ length: 100 }, (_, i) => i);
  assert.equal(fullMargin(margins), 97);
  assert.equal(fullMargin(new Uint8Array(100)), 1); // never zero: margins are divided by it
});

test("each connected region has one label, at the patch farthest from its edge", () => {
  const experts = Uint8Array.from([
    1, 1, 1, 2,
    1, 1, 1, 2,
    1, 1, 1, 2,
    3, 3, 3, 3,
  ]);
  const labels = regionLabels(experts, { width: 4, height: 4 });
  assert.deepEqual(labels, [
    { expert: 1, x: 1, y: 1, radius: 2 },
    { expert: 2, x: 3, y: 0, radius: 1 },
    { expert: 3, x: 0, y: 3, radius: 1 },
  ]);
});

test("regions that touch only at a corner are two", () => {
  const labels = regionLabels(Uint8Array.from([1, 2, 2, 1]), { width: 2, height: 2 });
  assert.deepEqual(labels.map(({ expert }) => expert), [1, 2, 2, 1]);
});

test("patches without an expert have no label, and an isolated expert alone has one", () => {
  const experts = Uint8Array.from([255, 1, 2, 2]);
  assert.deepEqual(regionLabels(experts, { width: 4, height: 1 }).map(({ expert }) => expert), [1, 2]);
  assert.deepEqual(regionLabels(experts, { width: 4, height: 1 }, 2).map(({ expert }) => expert), [2]);
});
