import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { Cells } from "../../web/expert_map/cells.mjs";
import { openPage } from "./page.mjs";

let calls;
let cells;

beforeEach(() => {
  openPage();
  calls = [];
  const record = (name) => (...given) => { calls.push([name, ...given]); };
  cells = new Cells({
    label: "patches", className: "map", onmove: record("move"), onleave: record("leave"), onpick: record("pick"),
    describe: (row, column) => `${row}/${column}`,
    onkey: (event) => event.key === "Escape",
  });
  // 4 rows and 10 columns on a canvas of 100 x 100, with 20 left of them.
  cells.layout({ x: 20, y: 0, width: 80, height: 100 }, 4, 10, [1, 2]);
});

function focus() {
  document.activeElement = cells.element;
  cells.element.focusVisible = true;
}

const press = (key, more = {}) => cells.element.fire("keydown", { key, ...more });

test("the cell under the pointer is found under any zoom", () => {
  // The page is shown at twice its size, from 10, 20 on.
  cells.element.fire("pointermove", { clientX: 10 + 2 * (20 + 8 * 3 + 4), clientY: 20 + 2 * 30 });
  assert.deepEqual(calls, [["move", 1, 3]]);
});

test("beside the cells the pointer is on none", () => {
  cells.element.fire("pointermove", { clientX: 10 + 2 * 19, clientY: 60 });
  cells.element.fire("click", { clientX: 10 + 2 * 19, clientY: 60 });
  assert.deepEqual(calls, [["leave"]]);
});

test("a click picks its cell, and the keyboard goes on from there", () => {
  cells.element.fire("click", { clientX: 10 + 2 * 24, clientY: 20 + 2 * 99 });
  press("ArrowRight");
  assert.deepEqual(calls, [["pick", 3, 0], ["move", 3, 1]]);
});

test("arrow keys move by one cell, with Shift by eight, and stop at the edges", () => {
  press("ArrowLeft");
  press("ArrowDown");
  press("ArrowRight", { shiftKey: true });
  press("ArrowRight", { shiftKey: true });
  press("ArrowUp", { shiftKey: true });
  assert.deepEqual(calls.map(([, ...cell]) => cell), [[1, 1], [2, 1], [2, 9], [2, 9], [0, 9]]);
});

test("Home and End go to the row's ends, with Ctrl to the first and the last cell", () => {
  press("End");
  press("Home");
  press("End", { ctrlKey: true });
  press("Home", { ctrlKey: true });
  assert.deepEqual(calls.map(([, ...cell]) => cell), [[1, 9], [1, 0], [3, 9], [0, 0]]);
});

test("Enter and Space pick the cell of the keyboard", () => {
  press("Enter");
  press(" ");
  assert.deepEqual(calls, [["pick", 1, 2], ["pick", 1, 2]]);
});

test("a key is taken from the page only if it means something here", () => {
  assert.ok(press("ArrowLeft").defaultPrevented);
  assert.ok(press("Escape").defaultPrevented);
  assert.ok(!press("a").defaultPrevented);
});

test("when the pointer leaves, a focused map goes back to the keyboard's cell", () => {
  cells.element.fire("pointerleave");
  focus();
  cells.element.fire("pointerleave");
  assert.deepEqual(calls, [["leave"], ["move", 1, 2]]);
});

test("a screen reader is told position, size and, when focused, the words for the cell", () => {
  assert.equal(cells.element.getAttribute("aria-rowcount"), "4");
  assert.equal(cells.element.getAttribute("aria-colcount"), "10");
  assert.equal(cells.cell.textContent, "");
  focus();
  press("ArrowDown");
  assert.equal(cells.cell.textContent, "2/2");
  assert.equal(cells.cell.getAttribute("aria-rowindex"), "3");
  assert.equal(cells.cell.getAttribute("aria-colindex"), "3");
  assert.deepEqual(
    [cells.cell.style.left, cells.cell.style.top, cells.cell.style.width, cells.cell.style.height],
    ["36px", "50px", "8px", "25px"],
  );
});

test("a smaller grid brings the keyboard's cell back inside", () => {
  press("End", { ctrlKey: true });
  cells.layout({ x: 0, y: 0, width: 100, height: 100 }, 2, 2);
  assert.deepEqual([cells.row, cells.column], [1, 1]);
});
