// The map's element: toolbar, maps, sliders, path and tabs, or a message when there is nothing to show.

import { blockPaths, loadCharts } from "./charts.mjs";
import { choice, h, rove, say, set, show, tabStop, uniqueId } from "./dom.mjs";
import { asData, asPicture, save } from "./export.mjs";
import { legend } from "./legend.mjs";
import { luminance } from "./palette.mjs";
import { pathStrip } from "./path.mjs";
import { scrubbers } from "./scrub.mjs";
import { stages } from "./stage.mjs";
import { MapState } from "./state.mjs";
import { STYLE } from "./style.mjs";
import { tokenList } from "./tokens.mjs";
import { text as t } from "../text.mjs";

const STYLE_ID = "d2m-expert-map-style";
const probe = document.createElement("canvas");
[probe.width, probe.height] = [1, 1];

/** A CSS colour, over black, as [r, g, b]. */
function rgbOf(colour) {
  const ctx = probe.getContext("2d", { willReadFrequently: true });
  ctx.fillStyle = "#000";
  ctx.fillRect(0, 0, 1, 1);
  ctx.fillStyle = colour;
  ctx.fillRect(0, 0, 1, 1);
  return [...ctx.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

/** The names of a trace's samples: number of the image, and which prompt. */
function sampleNames({ samples }) {
  const several = samples.some(({ prompt }) => prompt > 0);
  return samples.map(({ index, image, cond, prompt }) => {
    const known = cond === "positive" || cond === "negative";
    const name = t(known ? `map.sample_${cond}` : "map.sample_other", { number: (image ?? index) + 1, cond });
    return several ? `${name} ${prompt + 1}` : name;
  });
}

export class Panel {
  /** `onview(view)` is called with every change of the view. */
  constructor({ app, api, node, store, onview }) {
    if (!document.getElementById(STYLE_ID)) {
      document.head.append(h("style", { id: STYLE_ID }, STYLE));
    }
    this.onview = onview;
    this.state = new MapState(store, () => this.schedule());
    const { state } = this;
    this.status = h("div", { class: "d2m-hidden", role: "status", "aria-live": "polite" });
    const announce = (text) => {
      this.status.textContent = text;
      say(this.said, text);
    };
    this.said = h("div", { class: "d2m-said d2m-quiet", "aria-hidden": "true" }, t("map.how_to_read"));
    this.stage = stages(state, api);
    this.legend = legend(state, { app, node, announce });
    this.scrub = scrubbers(state);
    this.path = pathStrip(state);
    this.tabs = { load: loadCharts(state), blocks: blockPaths(state), text: tokenList(state) };
    this.notes = h("div", { class: "d2m-quiet", role: "note" });
    this.message = h("div", { class: "d2m-message" });
    this.body = h("div", { class: "d2m-body" },
      this.toolbar(), h("div", { class: "d2m-main" }, this.stage.element, this.legend.element),
      this.scrub.element, this.path.element, this.tabbed(), this.notes, this.said);
    this.element = h("div", {
      class: "d2m-map",
      role: "group",
      "aria-label": t("map.title"),
      onkeydown: (event) => {
        // Keys that are pressed in the map must not trigger ComfyUI's shortcuts, such as Delete for the node.
        if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
      },
    }, this.message, this.body, this.status);
    this.forwardToCanvas(app);
    this.sizes = new ResizeObserver(() => this.schedule());
    this.sizes.observe(this.element);
    this.themes = new MutationObserver(() => this.schedule());
    for (const element of [document.documentElement, document.body]) {
      this.themes.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
    }
    this.schedule();
  }

  toolbar() {
    const { state } = this;
    this.compare = choice(t("map.compare"), [
      ["a", "A", t("map.compare_a")], ["b", "B", t("map.compare_b")],
      ["side", t("map.compare_side")], ["difference", t("map.compare_difference")],
    ], (compare) => state.set({ compare }));
    this.sample = h("select", { "aria-label": t("map.sample"), onchange: () => state.set({ sample: Number(this.sample.value) }) });
    this.overlay = this.toggle("overlay", t("map.overlay"), t("map.overlay_title"));
    this.numbers = this.toggle("numbers", t("map.numbers"), t("map.numbers_title"));
    this.opacity = h("input", {
      type: "range", min: "0", max: "100", step: "5", "aria-label": t("map.opacity"), title: t("map.opacity"),
      oninput: () => state.set({ opacity: Number(this.opacity.value) / 100, overlay: true }),
    });
    const button = (text, title, onclick) => h("button", { type: "button", title, onclick }, text);
    return h("div", { class: "d2m-bar", role: "toolbar", "aria-label": t("map.toolbar") },
      this.compare.element, this.sample, h("span", { class: "d2m-space" }),
      this.overlay, this.opacity, this.numbers,
      button("PNG", t("map.export_png"), () => this.exportPicture()),
      button("JSON", t("map.export_json"), () => this.exportData()));
  }

  toggle(name, text, title) {
    const { state } = this;
    return h("button", {
      type: "button", title, "data-toggle": name, onclick: () => state.set({ [name]: !state.view[name] }),
    }, text);
  }

  tabbed() {
    const { state } = this;
    const list = h("div", { class: "d2m-tabs", role: "tablist" });
    this.tabButtons = {};
    this.tabPanels = {};
    for (const [name, { element }] of Object.entries(this.tabs)) {
      const id = uniqueId();
      this.tabButtons[name] = h("button", {
        type: "button", role: "tab", id, "data-tab": name, onclick: () => state.set({ tab: name }),
      }, t(`map.tab.${name}`));
      this.tabPanels[name] = h("div", { class: "d2m-tab", role: "tabpanel", "aria-labelledby": id }, element);
      list.append(this.tabButtons[name]);
    }
    rove(list, "button", { onmove: (button) => state.set({ tab: button.dataset.tab }) });
    return h("div", { class: "d2m-tabbed" }, list, ...Object.values(this.tabPanels));
  }

  /** Let the wheel zoom the graph and the middle button move it over the map too. (Nodes 2.0 does this by itself.) */
  forwardToCanvas(app) {
    const covers = () => !this.element.closest("[data-node-id]");
    this.element.addEventListener("wheel", (event) => {
      const scrolls = event.target.closest(".d2m-tokens");
      if (scrolls && scrolls.scrollHeight > scrolls.clientHeight && !event.ctrlKey) {
        event.stopPropagation();
      } else if (covers()) {
        event.preventDefault();
        app.canvas?.processMouseWheel?.(event);
      }
    }, { passive: false });
    for (const [name, method] of [["pointerdown", "processMouseDown"], ["pointermove", "processMouseMove"], ["pointerup", "processMouseUp"]]) {
      this.element.addEventListener(name, (event) => {
        const middle = name === "pointermove" ? event.buttons & 4 : event.button === 1;
        if (middle && covers()) app.canvas?.[method]?.(event);
      });
    }
  }

  /** Show the result of a run, or a saved one: {traces, images, batches, view}. */
  open(shown) {
    this.scrub.stop();
    return this.state.open(shown);
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.render();
    });
  }

  theme() {
    const style = getComputedStyle(this.element);
    const ground = rgbOf(style.getPropertyValue("--d2m-ground"));
    set(this.element, "data-dark", luminance(ground) < 0.2 ? "" : null);
    const value = (name) => getComputedStyle(this.element).getPropertyValue(`--d2m-${name}`).trim();
    return { text: value("text"), line: value("line"), accent: value("accent"), ground: value("ground"), empty: value("empty") };
  }

  render() {
    if (!this.element.isConnected || !this.element.clientWidth) return;
    const { state } = this;
    const theme = this.theme();
    const ready = state.ready && state.decoded.length > 0;
    show(this.body, ready);
    show(this.message, !ready);
    set(this.element, "aria-busy", String(state.busy));
    if (!ready) {
      say(this.message, this.messageText());
      return;
    }
    this.renderToolbar();
    this.renderNotes();
    this.legend.render();
    this.scrub.render();
    for (const [name, panel] of Object.entries(this.tabPanels)) show(panel, name === this.shownTab());
    this.path.render(theme);
    this.tabs[this.shownTab()].render(theme);
    this.stage.render(theme);
    this.reportView();
  }

  renderToolbar() {
    const { view, main, traces } = this.state;
    show(this.compare.element, traces.length > 1);
    this.compare.render(view.compare);
    set(this.element, "data-compare", view.compare === "side" ? "side" : null);
    const samples = sampleNames(main);
    const key = samples.join("|");
    if (this.samplesShown !== key) {
      this.sample.replaceChildren(...samples.map((name, value) => h("option", { value }, name)));
      this.samplesShown = key;
    }
    this.sample.value = this.state.mainSample;
    show(this.sample, samples.length > 1);
    set(this.overlay, "aria-pressed", String(view.overlay));
    set(this.numbers, "aria-pressed", String(view.numbers));
    this.opacity.value = view.opacity * 100;
    set(this.opacity, "aria-valuetext", `${Math.round(view.opacity * 100)} %`);
    show(this.tabButtons.blocks, main.groups.length > 0);
    show(this.tabButtons.text, main.blocks.some(({ text }) => text !== null));
    const buttons = Object.values(this.tabButtons);
    for (const button of buttons) set(button, "aria-selected", String(button.dataset.tab === this.shownTab()));
    tabStop(buttons, this.tabButtons[this.shownTab()]);
  }

  renderNotes() {
    const notes = this.state.traces.flatMap(({ meta }) => meta.notes ?? []);
    say(this.notes, [...new Set(notes)].join(" "));
    show(this.notes, notes.length > 0);
  }

  /** The chosen tab, or the load where this trace has nothing to show in it. */
  shownTab() {
    const { view, main } = this.state;
    if (view.tab === "blocks" && !main.groups.length) return "load";
    if (view.tab === "text" && main.blocks.every(({ text }) => text === null)) return "load";
    return view.tab in this.tabs ? view.tab : "load";
  }

  /** The message in the place of the map. */
  messageText() {
    const { problem, ids } = this.state;
    if (problem?.freed) return t("map.message.freed");
    if (problem?.empty) return t("map.message.empty_trace");
    if (problem) return t("map.message.failed", { message: problem.message });
    return t(ids.length ? "map.message.loading" : "map.message.nothing");
  }

  /** Report the view if it has changed. */
  reportView() {
    const kept = JSON.stringify(this.state.view);
    if (kept === this.kept) return;
    this.kept = kept;
    this.onview(JSON.parse(kept));
  }

  name(extension) {
    const { view, main } = this.state;
    return `expert-map-step${view.step + 1}-${main.layers[this.state.layer].name}.${extension}`;
  }

  exportPicture() {
    const name = this.name("png");
    asPicture(this.state, this.stage, this.theme()).toBlob((blob) => save(blob, name), "image/png");
  }

  exportData() {
    save(new Blob([JSON.stringify(asData(this.state))], { type: "application/json" }), this.name("json"));
  }

  remove() {
    this.scrub.stop();
    this.sizes.disconnect();
    this.themes.disconnect();
    cancelAnimationFrame(this.frame);
  }
}
