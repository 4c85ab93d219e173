// The legend: the experts with their colours and loads, and buttons that write rules into an Expert Mask node.

import { h, rove, say, set, show, tabStop } from "./dom.mjs";
import { idOf, insertMask, maskPlace, maskText, tracePlace, writeMask } from "./mask_node.mjs";
import { css, expertColour, inkOn } from "./palette.mjs";
import { clear, isolate, weigh, weights } from "./rules.mjs";
import { text as t } from "../text.mjs";

const BOOST = 2;

export function legend(state, { app, node, announce }) {
  const list = h("div", { class: "d2m-experts", role: "listbox", "aria-label": t("map.experts") });
  const items = [];
  rove(list, ".d2m-expert", { vertical: true });
  list.addEventListener("click", (event) => pick(event.target.closest(".d2m-expert")));
  list.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    pick(event.target.closest(".d2m-expert"));
  });

  function pick(item) {
    if (!item) return;
    const expert = Number(item.dataset.expert);
    state.set({ expert: state.view.expert === expert ? null : expert });
  }

  function addItem(expert) {
    const rgb = expertColour(expert);
    const parts = { share: h("span", { class: "d2m-share" }), weight: h("span", { class: "d2m-weight" }), bar: h("i") };
    const chip = h("span", { class: "d2m-chip" }, String(expert));
    Object.assign(chip.style, { background: css(rgb), color: css(inkOn(rgb)) });
    parts.bar.style.background = css(rgb);
    parts.element = h("div", { class: "d2m-expert", role: "option", "data-expert": expert },
      chip, h("span", { class: "d2m-track" }, parts.bar), parts.weight, parts.share);
    items.push(parts);
    list.append(parts.element);
  }

  const scope = h("select", { "aria-label": t("map.rules.scope"), onchange: () => state.set({ scope: scope.value }) },
    ...["layer", "kind", "all"].map((value) => h("option", { value }, t(`map.rules.${value}`))));
  const buttons = ["mute", "isolate", "boost", "clear"].map((action) => h("button", {
    type: "button", "data-action": action, title: t(`map.rules.${action}_title`), onclick: () => apply(action),
  }, t(`map.rules.${action}`)));
  const target = h("span", { class: "d2m-quiet" });
  const insert = h("button", { type: "button", "data-action": "insert", onclick: () => add() }, t("map.rules.insert"));
  const rules = h("div", { class: "d2m-rules", role: "group", "aria-label": t("map.rules.title") },
    h("div", { class: "d2m-actions" }, ...buttons), scope, target, insert);

  /** The pattern of the layers to which a rule applies. */
  function glob() {
    const { name } = state.main.layers[state.layer];
    if (state.view.scope === "all") return "*";
    return state.view.scope === "kind" ? name.replace(/\.\d+/, ".*") : name;
  }

  /** The names of the layers to which a rule applies. */
  function scoped() {
    const { layers } = state.main;
    const { name } = layers[state.layer];
    if (state.view.scope === "layer") return [name];
    const kind = (other) => other.replace(/\.\d+/, ".*");
    return layers.map((layer) => layer.name).filter((other) => state.view.scope === "all" || kind(other) === kind(name));
  }

  /** The Trace Routing node of the main trace. */
  function trace() {
    return tracePlace(app, node, state.mainIndex ? "compare" : "trace");
  }

  function apply(action) {
    const { expert } = state.view;
    const mask = maskPlace(trace());
    if (expert === null || !mask) return;
    const text = maskText(mask);
    const changed = {
      mute: () => weigh(text, glob(), expert, 0),
      isolate: () => isolate(text, glob(), expert),
      boost: () => weigh(text, glob(), expert, BOOST),
      clear: () => clear(text, scoped(), expert),
    }[action]();
    if (!writeMask(app, mask, changed)) return;
    announce(t(`map.rules.${action}_done`, { expert, blocks: glob(), id: idOf(mask) }));
    render();
  }

  function add() {
    const place = trace();
    const mask = place && insertMask(app, window.LiteGraph, place);
    announce(mask ? t("map.rules.inserted", { id: idOf(mask) }) : t("map.rules.no_model"));
    render();
    if (mask) buttons[0].focus();
  }

  function render() {
    const { main, view } = state;
    const { experts } = main.layers[state.layer];
    while (items.length < experts) addItem(items.length);
    const place = trace();
    const mask = maskPlace(place);
    const { name } = main.layers[state.layer];
    const applied = weights(maskText(mask), name, experts);
    const muted = main.muted(state.mainStep, state.layer);
    const shares = main.shares(state.mainStep, state.mainSample, state.layer);
    const highest = main.highestShare(state.mainSample);
    items.forEach((parts, expert) => {
      show(parts.element, expert < experts);
      if (expert >= experts) return;
      const share = shares?.[expert] ?? 0;
      parts.bar.style.width = `${(share / highest) * 100}%`;
      say(parts.share, muted.has(expert) ? t("map.muted") : shares ? `${(share * 100).toFixed(1)} %` : "–");
      say(parts.weight, applied[expert] === 1 ? "" : `×${applied[expert]}`);
      set(parts.element, "aria-selected", String(view.expert === expert));
      const rule = applied[expert] === 1 ? "" : `, ${t("map.rules.weight", { weight: applied[expert] })}`;
      set(parts.element, "aria-label", `${t("map.expert", { expert })}, ${parts.share.textContent}${rule}`);
    });
    const shown = items.slice(0, experts).map((parts) => parts.element);
    if (!shown.includes(document.activeElement)) tabStop(shown, shown[view.expert ?? 0]);
    for (const button of buttons) button.disabled = view.expert === null || !mask;
    scope.value = view.scope;
    show(insert, !mask && Boolean(place));
    if (mask) {
      say(target, view.expert === null ? t("map.rules.choose") : t("map.rules.into", { expert: view.expert, id: idOf(mask) }));
    } else {
      say(target, place ? t("map.rules.none") : t("map.rules.no_trace"));
    }
  }

  const element = h("div", { class: "d2m-legend" },
    h("div", { class: "d2m-heading" }, t("map.experts"), h("span", { class: "d2m-quiet" }, t("map.experts_hint"))), list, rules);
  return { element, render };
}
