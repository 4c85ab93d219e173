// Export of the map as a picture and as data.

import { drawMap } from "./drawing.mjs";
import { css, expertColour, inkOn } from "./palette.mjs";
import { settingsOf } from "./stage.mjs";
import { text as t } from "../text.mjs";

const MIN_SIDE = 768; // pixels of a map's longer side
const MAX_SIDE = 2048;
const LINE = 34; // pixels of a line below the maps

/** A canvas with the visible maps at the image's own size, a caption and the legend. */
export function asPicture(state, stage, theme) {
  const maps = stage.visible().map(([pane, both]) => ({ pane, picture: pane.picture(both) }));
  const scale = ({ grid, image }) => {
    const longer = image ? Math.max(image.naturalWidth, image.naturalHeight) : 16 * Math.max(grid.width, grid.height);
    return Math.min(MAX_SIDE, Math.max(MIN_SIDE, longer)) / Math.max(grid.width, grid.height);
  };
  const sizes = maps.map(({ picture }) => {
    const by = scale(picture);
    return { width: Math.round(picture.grid.width * by), height: Math.round(picture.grid.height * by) };
  });
  const { experts } = state.main.layers[state.layer];
  const width = sizes.reduce((sum, size) => sum + size.width, 0);
  const height = Math.max(...sizes.map((size) => size.height));
  const legendRows = Math.ceil((experts * 52) / (width - 24));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height + LINE * (1 + legendRows) + 8];
  const ctx = canvas.getContext("2d");
  ctx.fillStyle = theme.ground;
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  let x = 0;
  maps.forEach(({ picture }, index) => {
    const size = sizes[index];
    drawMap(ctx, { x, y: 0, ...size }, { ...picture, theme });
    x += size.width;
  });
  ctx.textBaseline = "middle";
  ctx.textAlign = "left";
  ctx.fillStyle = theme.text;
  ctx.font = "18px system-ui, sans-serif";
  const step = t("map.step_of", { step: state.view.step + 1, steps: state.steps });
  const settings = maps.map(({ pane }) => settingsOf(state, pane.index));
  ctx.fillText([step, state.main.layers[state.layer].name, ...new Set(settings)].join(" · "), 12, height + LINE / 2 + 4, width - 24);
  const perRow = Math.max(1, Math.floor((width - 24) / 52));
  for (let expert = 0; expert < experts; expert++) {
    const rgb = expertColour(expert);
    const at = [12 + (expert % perRow) * 52, height + LINE * (1 + Math.floor(expert / perRow)) + 6];
    ctx.fillStyle = css(rgb);
    ctx.fillRect(...at, 46, 24);
    ctx.fillStyle = css(inkOn(rgb));
    ctx.textAlign = "center";
    ctx.fillText(expert, at[0] + 23, at[1] + 13);
  }
  return canvas;
}

/** The traces' description, the view, and the choices of all layers at the step shown. */
export function asData(state) {
  return {
    view: state.view,
    traces: state.traces.map((trace, index) => ({
      ...trace.meta,
      shown: {
        step: state.stepOf(index),
        sample: state.sampleOf(index),
        layers: (state.decoded[index] ?? []).map((data, layer) => data && {
          name: trace.layers[layer].name,
          tokens: trace.tokens(layer),
          slots: trace.slots,
          experts: [...data.experts],
          gates: [...data.gates],
          margin: [...data.margin],
        }),
      },
    })),
  };
}

/** Offer a blob to the user as a download. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
