// The prompt's tokens, each with the number and colour of its best expert.

import { h, rove, say, set, show, tabStop } from "./dom.mjs";
import { css, expertColour, inkOn } from "./palette.mjs";
import { NONE } from "./trace.mjs";
import { text as t } from "../text.mjs";

const INKS = Array.from({ length: NONE }, (_, expert) => css(inkOn(expertColour(expert))));
const FILLS = Array.from({ length: NONE }, (_, expert) => css(expertColour(expert)));

/** The number of tokens before the padding, which is the run of equal pieces after the first at the end. */
export function withoutPadding(pieces) {
  let end = pieces.length;
  while (end > 1 && pieces[end - 1] === pieces[end - 2]) end--;
  return pieces.length - end < 2 ? pieces.length : end - 1;
}

export function tokenList(state) {
  const note = h("div", { class: "d2m-quiet" });
  const list = h("div", { class: "d2m-tokens", role: "listbox", "aria-label": t("map.tab.text") });
  const padding = h("div", { class: "d2m-quiet" });
  const element = h("div", { class: "d2m-text" }, note, list, padding);
  let key = null;
  let items = [];

  const indexOf = (target) => {
    const item = target?.closest?.(".d2m-token");
    return item ? Number(item.dataset.token) : null;
  };
  const hover = (index) => state.setHover(index === null ? null : { of: "text", index, trace: state.mainIndex });
  list.addEventListener("pointermove", (event) => hover(indexOf(event.target)));
  list.addEventListener("pointerleave", () => hover(null));
  list.addEventListener("focusin", (event) => hover(indexOf(event.target)));
  list.addEventListener("focusout", () => hover(null));
  const pin = (event) => {
    const index = indexOf(event.target);
    if (index === null) return;
    const { token } = state.view;
    state.set({ token: token?.of === "text" && token.index === index ? null : { of: "text", index } });
  };
  list.addEventListener("click", pin);
  list.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    pin(event);
  });
  rove(list, ".d2m-token", {});

  function build(pieces, count) {
    items = Array.from({ length: count }, (_, index) => {
      const piece = pieces?.[index];
      const tag = h("b");
      const word = piece === undefined ? String(index + 1) : piece.replace(/^▁/, "").replace("</w>", "") || "␣";
      const item = h("span", { class: "d2m-token", role: "option", "data-token": index }, h("span", {}, word), tag);
      if (piece?.startsWith("▁")) item.classList.add("d2m-word");
      return { item, tag, word };
    });
    list.replaceChildren(...items.map(({ item }) => item));
    tabStop(items.map(({ item }) => item), items[0]?.item);
  }

  function render() {
    const { main, view } = state;
    const pieces = main.meta.prompt?.[state.mainSample] ?? null;
    const count = pieces ? Math.min(withoutPadding(pieces), main.meta.text_tokens) : main.meta.text_tokens;
    const now = `${main.id}/${state.mainSample}`;
    if (now !== key) build(pieces, count);
    key = now;
    const layer = state.block.text;
    const top = layer === null || !state.mainDecoded ? null : main.top(state.mainDecoded, layer, "text");
    if (layer === null) say(note, t("map.note.no_text_tokens", { block: view.block }));
    else if (!top) say(note, state.mainDecoded ? t("map.note.skipped", { block: view.block }) : "");
    else say(note, main.layers[layer].name);
    items.forEach(({ item, tag, word }, index) => {
      const expert = top ? top.experts[index] : NONE;
      say(tag, expert === NONE ? "–" : expert);
      tag.style.background = expert === NONE ? "" : FILLS[expert];
      tag.style.color = expert === NONE ? "" : INKS[expert];
      item.classList.toggle("d2m-faded", view.expert !== null && expert !== view.expert);
      set(item, "aria-selected", String(view.token?.of === "text" && view.token.index === index));
      set(item, "aria-label", `${word}: ${expert === NONE ? t("map.no_expert") : t("map.expert", { expert })}`);
    });
    const rest = main.meta.text_tokens - count;
    show(padding, rest > 0);
    if (rest > 0) say(padding, t("map.padding", { count: rest }));
  }

  return { element, render };
}
