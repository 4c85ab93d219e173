// The image under its overlay: one map, two side by side, or the difference of two.

import { Cells } from "./cells.mjs";
import { h, say, show } from "./dom.mjs";
import { contain, context, difference, drawMap, drawMark, overlay, regionLabels } from "./drawing.mjs";
import { text as t } from "../text.mjs";
import { differing } from "./trace.mjs";

const LETTERS = ["A", "B"];

/** A cache of images by address. */
class Images {
  constructor(api, onload) {
    this.api = api;
    this.onload = onload;
    this.loaded = new Map();
  }

  /** The image of {filename, subfolder, type}, or null as long as it is not loaded. */
  get(place) {
    if (!place) return null;
    const address = this.api.apiURL(`/view?${new URLSearchParams(place)}`);
    let image = this.loaded.get(address);
    if (!image) {
      image = new Image();
      image.onload = this.onload;
      image.src = address;
      this.loaded.set(address, image);
      if (this.loaded.size > 8) this.loaded.delete(this.loaded.keys().next().value);
    }
    return image.complete && image.naturalWidth ? image : null;
  }
}

class Pane {
  constructor(state, index, images) {
    Object.assign(this, { state, index, images });
    this.cells = new Cells({
      label: t("map.patches"),
      className: "d2m-stage",
      onmove: (row, column) => state.setHover({ of: "image", index: row * this.grid.width + column, trace: index }),
      onleave: () => state.setHover(null),
      onpick: (row, column) => this.pin(row * this.grid.width + column),
      describe: (row, column) => this.describe(row, column),
      onkey: (event) => this.key(event),
    });
    this.title = h("div", { class: "d2m-pane-title" });
    this.note = h("div", { class: "d2m-note" });
    this.element = h("div", { class: "d2m-pane" }, this.title, this.cells.element, this.note);
  }

  get trace() {
    return this.state.traces[this.index];
  }

  get grid() {
    return this.trace.grid;
  }

  pin(index) {
    const { token } = this.state.view;
    this.state.set({ token: token?.of === "image" && token.index === index ? null : { of: "image", index } });
  }

  key(event) {
    const { state } = this;
    if (event.key === "Escape") state.set({ token: null });
    else if (event.key === "PageUp") state.set({ step: state.view.step + 1 });
    else if (event.key === "PageDown") state.set({ step: state.view.step - 1 });
    else return false;
    return true;
  }

  describe(row, column) {
    const place = t("map.patch", { row: row + 1, column: column + 1 });
    const layer = this.state.layerOf(this.index, "image");
    const choice = this.state.decoded[this.index] && layer !== null
      ? this.trace.choices(this.state.decoded[this.index], layer, "image", row * this.grid.width + column) : null;
    if (!choice) return place;
    const experts = choice.chosen.map(({ expert, gate }) => `${t("map.expert", { expert })} ${Math.round(gate * 100)} %`);
    return `${place}: ${experts.join(", ")}`;
  }

  /** What the map shows, for the screen and for the export: {image, layer, labels, note}. */
  picture(both) {
    const { state, trace, grid } = this;
    const { view } = state;
    const image = this.images.get(state.imageOf(this.index));
    const found = { image, layer: null, labels: null, note: "", grid };
    const layer = state.layerOf(this.index, "image");
    const decoded = state.decoded[this.index];
    if (layer === null) return { ...found, note: t("map.note.no_image_tokens", { block: view.block }) };
    if (!decoded) return found;
    const top = trace.top(decoded, layer);
    if (!top) return { ...found, note: t("map.note.skipped", { block: view.block }) };
    if (both) {
      const other = state.layerOf(1, "image");
      const topOther = other === null ? null : state.traces[1].top(state.decoded[1], other);
      const share = differing(top, topOther);
      if (share === null || grid.width !== state.traces[1].grid.width) {
        return { ...found, note: t("map.note.incomparable") };
      }
      if (view.overlay) found.layer = difference(top, topOther, grid, view.opacity);
      return { ...found, note: t("map.note.differing", { percent: (share * 100).toFixed(1) }) };
    }
    if (!view.overlay) return found;
    const opacity = image ? view.opacity : Math.max(view.opacity, 0.9);
    found.layer = overlay(top, grid, { opacity, only: view.expert });
    if (view.numbers) found.labels = regionLabels(top.experts, grid, view.expert);
    return found;
  }

  render(theme, { titled, both }) {
    const { state, grid } = this;
    show(this.title, titled);
    say(this.title, both ? t("map.difference_title") : `${LETTERS[this.index]} · ${settingsOf(state, this.index)}`);
    const picture = this.picture(both);
    say(this.note, picture.note);
    show(this.note, picture.note !== "");
    const { ctx, width, height } = context(this.cells.canvas);
    const rect = contain(width, height, grid.width / grid.height);
    drawMap(ctx, rect, { ...picture, theme });
    const { token } = state.view;
    if (token?.of === "image" && token.index < this.trace.patches) drawMark(ctx, this.patchRect(rect, token.index));
    const hover = state.hover;
    if (hover?.of === "image" && hover.index < this.trace.patches) drawMark(ctx, this.patchRect(rect, hover.index));
    const at = this.placed ? null : [Math.floor(grid.height / 2), Math.floor(grid.width / 2)];
    this.placed = true;
    this.cells.layout(rect, grid.height, grid.width, at);
  }

  patchRect(rect, index) {
    const { width, height } = this.grid;
    const [w, ht] = [rect.width / width, rect.height / height];
    return { x: rect.x + (index % width) * w, y: rect.y + Math.floor(index / width) * ht, width: w, height: ht };
  }
}

/** The settings of the shown step of a trace, in words. */
export function settingsOf(state, index) {
  const step = state.traces[index].steps[state.stepOf(index)];
  const parts = [];
  for (const [name, value] of Object.entries(step.settings ?? {})) {
    if (["top_k", "capacity", "active_blocks"].includes(name) && value !== null) {
      parts.push(`${t(`map.setting.${name}`)} ${Array.isArray(value) ? value.join("/") : value}`);
    }
  }
  const allotted = step.settings?.top_k_by_ffn?.[state.main?.layers[state.layer]?.name]; // under a budget
  if (allotted !== undefined) parts.unshift(`${t("map.setting.top_k")} ${allotted}`);
  return parts.join(" · ") || t("map.step_of", { step: state.stepOf(index) + 1, steps: state.traces[index].steps.length });
}

export function stages(state, api) {
  const images = new Images(api, () => state.onchange());
  const panes = [0, 1].map((index) => new Pane(state, index, images));
  return {
    element: h("div", { class: "d2m-stages" }, ...panes.map((pane) => pane.element)),
    panes,
    /** The visible panes: [pane, whether it shows the difference]. */
    visible() {
      const { compare } = state.view;
      if (compare === "side") return [[panes[0], false], [panes[1], false]];
      return [[panes[compare === "b" ? 1 : 0], compare === "difference"]];
    },
    render(theme) {
      const visible = new Map(this.visible());
      for (const pane of panes) show(pane.element, visible.has(pane));
      for (const [pane, both] of visible) pane.render(theme, { titled: state.traces.length > 1, both });
    },
  };
}
