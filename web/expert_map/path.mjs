// One token's path through all blocks at this step, and the experts that it chose in the block shown.

import { Cells } from "./cells.mjs";
import { h, say, set, show } from "./dom.mjs";
import { context, drawPath } from "./drawing.mjs";
import { css, expertColour, inkOn } from "./palette.mjs";
import { text as t } from "../text.mjs";

/** The index of a token's trace. */
function traceOf(state, token) {
  return token.trace ?? state.mainIndex;
}

/** The token's choices in every block (see Trace.choices), null where nothing was routed. */
export function pathOf(state, token) {
  const index = traceOf(state, token);
  const [trace, decoded] = [state.traces[index], state.decoded[index]];
  return trace.blocks.map((block) =>
    (block[token.of] === null || !decoded ? null : trace.choices(decoded, block[token.of], token.of, token.index)));
}

export function tokenName(state, token) {
  const index = traceOf(state, token);
  const trace = state.traces[index];
  if (token.of === "image") {
    const { width } = trace.grid;
    return t("map.patch", { row: Math.floor(token.index / width) + 1, column: (token.index % width) + 1 });
  }
  const piece = trace.meta.prompt?.[state.sampleOf(index)]?.[token.index];
  return piece ? t("map.token_named", { number: token.index + 1, piece: piece.replace("▁", "").trim() || "␣" })
    : t("map.token", { number: token.index + 1 });
}

export function pathStrip(state) {
  const title = h("span", { class: "d2m-path-title" });
  const chosen = h("span", { class: "d2m-path-chosen" });
  const cells = new Cells({
    label: t("map.path"),
    className: "d2m-path",
    onmove: (_, column) => point(column),
    onleave: () => point(null),
    onpick: (_, column) => {
      const name = state.traces[traceOf(state, state.token ?? {})].blocks[column].name;
      if (state.main.blocks.some((block) => block.name === name)) state.set({ block: name });
    },
    describe: (_, column) => words(column),
  });
  let pointed = null; // index of the block under pointer or keyboard

  function point(column) {
    if (pointed === column) return;
    pointed = column;
    if (state.ready) render(theme);
  }

  function words(column) {
    const token = state.token;
    if (!token) return t("map.path_hint");
    const block = state.traces[traceOf(state, token)].blocks[column];
    const choice = pathOf(state, token)[column];
    if (!choice) return `${block.name}: ${t("map.nothing_routed")}`;
    const experts = choice.chosen.map(({ expert, gate }) => `${t("map.expert", { expert })} ${Math.round(gate * 100)} %`);
    return `${block.name}: ${experts.join(", ") || t("map.no_expert")}`;
  }

  function chips(choice) {
    chosen.replaceChildren(...choice.chosen.map(({ expert, gate }) => {
      const rgb = expertColour(expert);
      const chip = h("span", { class: "d2m-chip" }, String(expert));
      Object.assign(chip.style, { background: css(rgb), color: css(inkOn(rgb)) });
      return h("span", { class: "d2m-gate" }, chip, `${Math.round(gate * 100)} %`);
    }), choice.chosen.length ? "" : t("map.no_expert"),
    h("span", { class: "d2m-quiet" }, t("map.margin", { margin: choice.margin.toFixed(2) })));
  }

  let theme = null;

  function render(now) {
    theme = now;
    const token = state.token;
    set(cells.element, "data-empty", token ? null : "");
    if (!token) {
      say(title, t("map.path_hint"));
      chosen.replaceChildren();
    }
    const trace = token ? state.traces[traceOf(state, token)] : state.main;
    const path = token ? pathOf(state, token) : trace.blocks.map(() => null);
    const current = trace.blocks.findIndex(({ name }) => name === state.view.block);
    if (token) {
      const at = pointed ?? current;
      const block = trace.blocks[at]?.name ?? state.view.block;
      say(title, `${tokenName(state, token)} · ${block}`);
      if (path[at]) chips(path[at]);
      else chosen.replaceChildren(h("span", { class: "d2m-quiet" }, t("map.nothing_routed")));
    }
    const { ctx, width, height } = context(cells.canvas);
    const plot = { x: 2, y: 2, width: width - 4, height: height - 4 };
    drawPath(ctx, plot, { path, current, theme, only: state.view.expert });
    const focused = document.activeElement === cells.element;
    cells.layout(plot, 1, path.length, focused ? null : [0, Math.max(0, current)]);
    show(axis, trace.blocks.some(({ kind }) => kind !== trace.blocks[0].kind));
    const doubles = trace.blocks.filter(({ kind }) => kind === trace.blocks[0].kind).length;
    axis.style.gridTemplateColumns = `${doubles}fr ${Math.max(1, trace.blocks.length - doubles)}fr`;
    say(axis.children[0], trace.blocks[0].kind);
    say(axis.children[1], trace.blocks.at(-1).kind);
  }

  const axis = h("div", { class: "d2m-axis", "aria-hidden": "true" }, h("span"), h("span"));
  const element = h("div", { class: "d2m-path-part" },
    h("div", { class: "d2m-heading" }, title, chosen), cells.element, axis);
  return { element, render };
}
