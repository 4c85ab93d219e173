// A canvas of cells that keyboard and screen reader use as a grid. One element moves over the cells and stands for each.

import { h, say, set, uniqueId } from "./dom.mjs";

const LEAP = 8; // cells, with Shift

export class Cells {
  /**
   * Callbacks: `onmove(row, column)` after a move of pointer or arrow keys; `onleave()` when neither is on a cell any
   * more; `onpick(row, column)` after a click or Enter; `describe(row, column)` returns a cell's words; `onkey(event)`
   * returns true if it has handled another key.
   */
  constructor({ label, className, onmove, onleave, onpick, describe, onkey }) {
    Object.assign(this, { onmove, onleave, onpick, describe, onkey });
    [this.rows, this.columns, this.row, this.column] = [1, 1, 0, 0];
    this.plot = { x: 0, y: 0, width: 1, height: 1 };
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.cell = h("div", { class: "d2m-cell", role: "gridcell", id: uniqueId() });
    this.element = h("div", {
      class: `d2m-cells ${className}`, role: "grid", tabindex: "0", "aria-label": label,
      "aria-activedescendant": this.cell.id,
      onkeydown: (event) => this.key(event),
      onpointermove: (event) => this.point(event),
      onpointerleave: () => this.leave(),
      onfocus: () => this.element.matches(":focus-visible") && this.move(this.row, this.column),
      onblur: () => this.leave(),
      onclick: (event) => this.click(event),
    }, this.canvas, h("div", { role: "row" }, this.cell));
  }

  /** Set the cells' rectangle on the canvas (CSS pixels), their number and, if given, the keyboard's cell. */
  layout(plot, rows, columns, at = null) {
    Object.assign(this, { plot, rows, columns });
    if (at) [this.row, this.column] = at;
    this.row = Math.min(Math.max(this.row, 0), rows - 1);
    this.column = Math.min(Math.max(this.column, 0), columns - 1);
    set(this.element, "aria-rowcount", rows);
    set(this.element, "aria-colcount", columns);
    this.mark();
  }

  mark() {
    const { plot, rows, columns, row, column, cell } = this;
    const [width, height] = [plot.width / columns, plot.height / rows];
    Object.assign(cell.style, {
      left: `${plot.x + column * width}px`, top: `${plot.y + row * height}px`, width: `${width}px`, height: `${height}px`,
    });
    set(cell, "aria-rowindex", row + 1);
    set(cell, "aria-colindex", column + 1);
    if (document.activeElement === this.element) say(cell, this.describe(row, column));
  }

  /** The cell under the pointer, or null. Computed from fractions of the element, so that zoom does not matter. */
  under(event) {
    const box = this.element.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.element.offsetWidth - this.plot.x;
    const y = ((event.clientY - box.top) / box.height) * this.element.offsetHeight - this.plot.y;
    if (x < 0 || y < 0 || x >= this.plot.width || y >= this.plot.height) return null;
    return [Math.floor((y / this.plot.height) * this.rows), Math.floor((x / this.plot.width) * this.columns)];
  }

  point(event) {
    const cell = this.under(event);
    if (cell) this.onmove?.(...cell);
    else this.leave();
  }

  leave() {
    if (document.activeElement === this.element && this.element.matches(":focus-visible")) {
      this.onmove?.(this.row, this.column);
    } else {
      this.onleave?.();
    }
  }

  click(event) {
    const cell = this.under(event);
    if (!cell) return;
    [this.row, this.column] = cell;
    this.mark();
    this.onpick?.(...cell);
  }

  move(row, column) {
    this.row = Math.min(Math.max(row, 0), this.rows - 1);
    this.column = Math.min(Math.max(column, 0), this.columns - 1);
    this.mark();
    this.onmove?.(this.row, this.column);
  }

  key(event) {
    const by = event.shiftKey ? LEAP : 1;
    const { row, column } = this;
    if (event.key === "ArrowLeft") this.move(row, column - by);
    else if (event.key === "ArrowRight") this.move(row, column + by);
    else if (event.key === "ArrowUp") this.move(row - by, column);
    else if (event.key === "ArrowDown") this.move(row + by, column);
    else if (event.key === "Home") this.move(event.ctrlKey ? 0 : row, 0);
    else if (event.key === "End") this.move(event.ctrlKey ? this.rows - 1 : row, this.columns - 1);
    else if (event.key === "Enter" || event.key === " ") this.onpick?.(row, column);
    else if (!this.onkey?.(event)) return;
    event.preventDefault();
  }
}
