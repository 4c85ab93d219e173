// Charts: load of the experts by block and by step, difference of two traces, and the blocks that each group ran.

import { Cells } from "./cells.mjs";
import { h, say, show } from "./dom.mjs";
import { context, drawBlockPaths, drawColumns, drawShares } from "./drawing.mjs";
import { css, sequential } from "./palette.mjs";
import { text as t } from "../text.mjs";
import { differing } from "./trace.mjs";

const GUTTER = 26; // CSS pixels left of a chart, for the experts' numbers

/** A chart: its title, a line about the cell under the pointer, and its cells. */
function chart(titleKey, className, callbacks) {
  const title = h("span", {}, t(titleKey));
  const readout = h("span", { class: "d2m-quiet d2m-readout-text" });
  const cells = new Cells({
    label: t(titleKey),
    className,
    ...callbacks,
    onmove: (row, column) => say(readout, callbacks.describe(row, column)),
    onleave: () => say(readout, ""),
  });
  const element = h("div", { class: "d2m-chart" }, h("div", { class: "d2m-heading" }, title, readout), cells.element);
  return { element, cells, title };
}

function percent(share) {
  return `${(share * 100).toFixed(1)} %`;
}

export function loadCharts(state) {
  const columnsOf = () => state.main.blocks;
  const layerAt = (column) => {
    const block = columnsOf()[column];
    return block[state.view.stream] ?? block.image ?? block.text;
  };
  const sharesAt = (step, layer) => state.main.shares(step, state.mainSample, layer);
  const describeShare = (shares, expert, name) => {
    if (!shares) return t("map.not_run", { name });
    return `${name} · ${t("map.expert", { expert })} · ${percent(shares[expert] ?? 0)}`;
  };

  const byLayer = chart("map.load_by_layer", "d2m-heat", {
    describe: (row, column) => {
      const layer = layerAt(column);
      return describeShare(sharesAt(state.mainStep, layer), row, state.main.layers[layer].name);
    },
    onpick: (_, column) => state.set({ block: columnsOf()[column].name }),
  });
  const byStep = chart("map.load_by_step", "d2m-heat", {
    describe: (row, column) => describeShare(sharesAt(column, state.layer), row, t("map.step_of", { step: column + 1, steps: state.main.steps.length })),
    onpick: (_, column) => state.set({ step: column }),
  });
  const difference = chart("map.difference_by_layer", "d2m-columns", {
    describe: (_, column) => {
      const value = differences()[column];
      return `${columnsOf()[column].name} · ${value === null ? t("map.note.incomparable") : percent(value)}`;
    },
    onpick: (_, column) => state.set({ block: columnsOf()[column].name }),
  });

  /** For each block, the share of tokens whose best expert differs between the two traces; null where incomparable. */
  function differences() {
    const [one, other] = state.traces;
    const { stream } = state.view;
    return one.blocks.map((block) => {
      const layer = other.blocks.find(({ name }) => name === block.name)?.[stream] ?? null;
      if (block[stream] === null || layer === null || !state.decoded[0] || !state.decoded[1]) return null;
      return differing(one.top(state.decoded[0], block[stream], stream), other.top(state.decoded[1], layer, stream));
    });
  }

  const scale = h("div", { class: "d2m-scale" }, h("span", {}, "0 %"), h("i"), h("span"));
  scale.children[1].style.background =
    `linear-gradient(90deg, ${Array.from({ length: 9 }, (_, i) => css(sequential(i / 8))).join(",")})`;
  const element = h("div", { class: "d2m-charts" }, byLayer.element, byStep.element, difference.element, scale);

  function draw({ cells }, theme, { columns, rows, share, current, highest }) {
    const { ctx, width, height } = context(cells.canvas);
    const plot = { x: GUTTER, y: 2, width: width - GUTTER - 2, height: height - 4 };
    drawShares(ctx, plot, { columns, rows, share, highest, current, expert: state.view.expert, theme });
    const focused = document.activeElement === cells.element;
    cells.layout(plot, rows, columns, focused ? null : [state.view.expert ?? 0, Math.max(0, current)]);
  }

  function render(theme) {
    const { main } = state;
    const highest = main.highestShare(state.mainSample);
    const byColumn = columnsOf().map((_, column) => sharesAt(state.mainStep, layerAt(column)));
    draw(byLayer, theme, {
      columns: columnsOf().length,
      rows: main.experts,
      share: (column, row) => byColumn[column]?.[row] ?? null,
      current: state.blockIndex,
      highest,
    });
    const { name, experts } = main.layers[state.layer];
    say(byStep.title, `${t("map.load_by_step")} · ${name}`);
    const perStep = main.steps.map((_, step) => sharesAt(step, state.layer));
    draw(byStep, theme, {
      columns: main.steps.length,
      rows: experts,
      share: (column, row) => perStep[column]?.[row] ?? null,
      current: state.mainStep,
      highest,
    });
    say(scale.children[2], percent(highest));
    const comparing = state.traces.length > 1 && ["side", "difference"].includes(state.view.compare);
    show(difference.element, comparing);
    if (!comparing) return;
    const { ctx, width, height } = context(difference.cells.canvas);
    const plot = { x: GUTTER, y: 2, width: width - GUTTER - 2, height: height - 4 };
    drawColumns(ctx, plot, { values: differences(), current: state.blockIndex, theme });
    const focused = document.activeElement === difference.cells.element;
    difference.cells.layout(plot, 1, columnsOf().length, focused ? null : [0, state.blockIndex]);
  }

  return { element, render };
}

export function blockPaths(state) {
  const paths = chart("map.block_paths", "d2m-blocks", {
    describe: (row, column) => {
      const { group, block } = at(row);
      const chosen = chose(row, column)[state.mainSample];
      const step = t("map.step_of", { step: column + 1, steps: state.main.steps.length });
      return `${blockName(state.main.groups[group], block)} · ${step} · ${t(chosen ? "map.chosen" : "map.passed_by")}`;
    },
    onpick: (row, column) => {
      const { group, block } = at(row);
      const name = blockName(state.main.groups[group], block);
      const known = state.main.blocks.some((other) => other.name === name);
      state.set({ step: column, ...(known ? { block: name } : {}) });
    },
  });
  const hint = h("div", { class: "d2m-quiet" });
  const element = h("div", { class: "d2m-charts" }, paths.element, hint);

  function at(row) {
    let first = 0;
    for (let group = 0; group < state.main.groups.length; group++) {
      const { blocks } = state.main.groups[group];
      if (row < first + blocks) return { group, block: row - first };
      first += blocks;
    }
    return { group: 0, block: 0 };
  }

  function chose(row, step) {
    const { group, block } = at(row);
    return state.main.steps[step].samples.map((sample) => sample.blocks[group][block]);
  }

  function render(theme) {
    let row = 0;
    const groups = state.main.groups.map((group) => {
      const first = row;
      row += group.blocks;
      const labels = Array.from({ length: group.blocks }, (_, block) => `${group.kind.replace("_blocks", "")} ${group.first + block}`);
      return { row: first, blocks: group.blocks, labels };
    });
    const shown = state.main.groups.flatMap((group) =>
      Array.from({ length: group.blocks }, (_, block) => blockName(group, block))).indexOf(state.view.block);
    paths.cells.element.style.minHeight = `${Math.min(220, row * 14)}px`;
    const { ctx, width, height } = context(paths.cells.canvas);
    const plot = { x: 58, y: 2, width: width - 60, height: height - 4 };
    drawBlockPaths(ctx, plot, {
      groups, rows: row, steps: state.main.steps.length, chose,
      sample: state.mainSample, step: state.mainStep, row: shown, theme,
    });
    const focused = document.activeElement === paths.cells.element;
    paths.cells.layout(plot, row, state.main.steps.length, focused ? null : [Math.max(0, shown), state.mainStep]);
    say(hint, t(state.main.samples.length > 1 ? "map.block_paths_samples" : "map.block_paths_hint"));
  }

  return { element, render };
}

/** The name that a block of a group has in the file. */
function blockName(group, block) {
  const kind = group.kind.endsWith("_blocks") ? group.kind : `${group.kind}_blocks`;
  return `${kind}.${group.first + block}`;
}
