// All drawing on canvases. `theme` has the colours { text, line, accent, ground, empty }.

import { css, expertColour, inkOn, sequential } from "./palette.mjs";
import { NONE } from "./trace.mjs";

const FAINTEST = 0.3; // share of the overlay's opacity where the margin is zero
const FONT = "system-ui, sans-serif";

/** Fit a canvas's pixels to its size on the screen, under any zoom of the graph. The context uses CSS pixels. */
export function context(canvas) {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const zoom = width ? canvas.getBoundingClientRect().width / width : 1;
  const ratio = Math.min(3, Math.max(1, (window.devicePixelRatio || 1) * zoom));
  const [w, h] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  return { ctx, width, height };
}

/** A canvas whose pixels `paint(data)` has set. */
function raster(width, height, paint) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const ctx = canvas.getContext("2d");
  const data = ctx.createImageData(width, height);
  paint(data.data);
  ctx.putImageData(data, 0, 0);
  return canvas;
}

const COLOURS = Array.from({ length: NONE }, (_, expert) => expertColour(expert));

/** The margin from which on the overlay is fully opaque: 2 % of the patches have a larger one. At least 1. */
export function fullMargin(margin) {
  const counts = new Uint32Array(256);
  for (const value of margin) counts[value]++;
  let left = Math.floor(margin.length * 0.02);
  let at = 255;
  while (at > 1 && left >= counts[at]) left -= counts[at--];
  return at;
}

/** The overlay, one pixel per patch: the hue is the best expert, the opacity its margin. `only` isolates an expert. */
export function overlay(top, grid, { opacity, only = null }) {
  const full = fullMargin(top.margin);
  return raster(grid.width, grid.height, (pixels) => {
    for (let i = 0, at = 0; i < top.experts.length; i++, at += 4) {
      const expert = top.experts[i];
      if (expert === NONE) continue;
      if (only !== null && expert !== only) {
        pixels.set([0, 0, 0, 140 * opacity], at);
        continue;
      }
      const shown = only === null ? FAINTEST + (1 - FAINTEST) * Math.min(1, top.margin[i] / full) : 1;
      pixels.set(COLOURS[expert], at);
      pixels[at + 3] = 255 * opacity * shown;
    }
  });
}

/** The patches in which two traces differ: left half in the colour of the first, right half in that of the other. */
export function difference(one, other, grid, opacity) {
  return raster(grid.width * 2, grid.height, (pixels) => {
    for (let i = 0, at = 0; i < one.experts.length; i++, at += 8) {
      if (one.experts[i] === other.experts[i]) {
        pixels[at + 3] = pixels[at + 7] = 165; // darkens the image
        continue;
      }
      [one.experts[i], other.experts[i]].forEach((expert, half) => {
        if (expert === NONE) return;
        pixels.set(COLOURS[expert], at + 4 * half);
        pixels[at + 4 * half + 3] = 255 * opacity;
      });
    }
  });
}

/** A label for each connected region with the same best expert, at its innermost patch: [{expert, x, y, radius}]. */
export function regionLabels(experts, { width, height }, only = null) {
  const depth = new Uint16Array(experts.length); // patches to the edge of the region
  const same = (i, x, y) => x >= 0 && y >= 0 && x < width && y < height && experts[y * width + x] === experts[i];
  const edge = (i, x, y) => (same(i, x, y) ? depth[y * width + x] + 1 : 1);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) depth[i] = Math.min(edge(i, x - 1, y), edge(i, x, y - 1));
  }
  for (let y = height - 1, i = experts.length - 1; y >= 0; y--) {
    for (let x = width - 1; x >= 0; x--, i--) depth[i] = Math.min(depth[i], edge(i, x + 1, y), edge(i, x, y + 1));
  }
  const seen = new Uint8Array(experts.length);
  const stack = [];
  const labels = [];
  for (let start = 0; start < experts.length; start++) {
    if (seen[start]) continue;
    let best = start;
    seen[start] = 1;
    stack.push(start);
    while (stack.length) {
      const i = stack.pop();
      if (depth[i] > depth[best]) best = i;
      const x = i % width;
      const y = (i - x) / width;
      for (const [nx, ny] of [[x - 1, y], [x + 1, y], [x, y - 1], [x, y + 1]]) {
        if (!same(i, nx, ny) || seen[ny * width + nx]) continue;
        seen[ny * width + nx] = 1;
        stack.push(ny * width + nx);
      }
    }
    const expert = experts[start];
    if (expert === NONE || (only !== null && expert !== only)) continue;
    labels.push({ expert, x: best % width, y: Math.floor(best / width), radius: depth[best] });
  }
  return labels;
}

/** The largest rectangle with the given width/height that fits into width x height, centred. */
export function contain(width, height, proportion) {
  const w = Math.min(width, height * proportion);
  const h = w / proportion;
  return { x: (width - w) / 2, y: (height - h) / 2, width: w, height: h };
}

/** Draw image (or a plain ground), overlay and labels into the rectangle. */
export function drawMap(ctx, rect, { image, layer, labels, grid, theme }) {
  ctx.fillStyle = theme.empty;
  ctx.fillRect(rect.x, rect.y, rect.width, rect.height);
  ctx.imageSmoothingEnabled = true;
  ctx.imageSmoothingQuality = "high";
  if (image) ctx.drawImage(image, rect.x, rect.y, rect.width, rect.height);
  if (layer) {
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(layer, rect.x, rect.y, rect.width, rect.height);
  }
  if (!labels) return;
  const cell = rect.width / grid.width;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  ctx.lineJoin = "round";
  for (const { expert, x, y, radius } of labels) {
    const room = cell * (2 * radius - 1);
    if (room < (radius > 1 ? 12 : 22)) continue; // a single patch has a number only if it is large
    const size = Math.min(22, Math.max(10, room * 0.5));
    ctx.font = `600 ${size}px ${FONT}`;
    const at = [rect.x + (x + 0.5) * cell, rect.y + ((y + 0.5) * rect.height) / grid.height];
    ctx.lineWidth = size / 4;
    ctx.strokeStyle = "rgba(0,0,0,.75)";
    ctx.strokeText(expert, ...at);
    ctx.fillStyle = "#fff";
    ctx.fillText(expert, ...at);
  }
}

/** Outline a cell so that it is visible on any ground. */
export function drawMark(ctx, { x, y, width, height }) {
  ctx.lineWidth = 3.5;
  ctx.strokeStyle = "#000";
  ctx.strokeRect(x, y, width, height);
  ctx.lineWidth = 1.5;
  ctx.strokeStyle = "#fff";
  ctx.strokeRect(x, y, width, height);
}

/**
 * Draw shares as colours, columns x rows in the plot. `share(column, row)` is from 0 to `highest`, or null for no value.
 * The column `current` and the row of `expert` are outlined. The experts' numbers and colours stand left of the plot.
 */
export function drawShares(ctx, plot, { columns, rows, share, highest, current, expert, theme }) {
  const cells = raster(columns, rows, (pixels) => {
    for (let row = 0, at = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++, at += 4) {
        const value = share(column, row);
        if (value === null) continue;
        pixels.set(sequential(value / highest), at);
        pixels[at + 3] = 255;
      }
    }
  });
  hatch(ctx, plot, theme);
  ctx.imageSmoothingEnabled = false;
  ctx.drawImage(cells, plot.x, plot.y, plot.width, plot.height);
  const [cw, ch] = [plot.width / columns, plot.height / rows];
  ctx.font = `${Math.min(10, Math.max(7, ch))}px ${FONT}`;
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  const every = Math.ceil(8 / ch); // rows from one number to the next, so that they do not touch
  for (let row = 0; row < rows; row++) {
    const y = plot.y + row * ch;
    ctx.fillStyle = css(expertColour(row));
    ctx.fillRect(plot.x - 6, y, 4, Math.max(1, ch - (ch > 4 ? 1 : 0)));
    ctx.fillStyle = theme.text;
    if (row % every === 0) ctx.fillText(row, plot.x - 9, y + ch / 2 + 0.5);
  }
  if (expert !== null && expert < rows) {
    ctx.lineWidth = 1.5;
    ctx.strokeStyle = theme.text;
    ctx.strokeRect(plot.x - 7, plot.y + expert * ch, plot.width + 7, ch);
  }
  if (current >= 0) drawMark(ctx, { x: plot.x + current * cw, y: plot.y - 1, width: cw, height: plot.height + 2 });
}

/** Fill a rectangle with fine diagonal lines, the sign for "did not run". */
export function hatch(ctx, { x, y, width, height }, theme) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(x, y, width, height);
  ctx.clip();
  ctx.fillStyle = theme.empty;
  ctx.fillRect(x, y, width, height);
  ctx.strokeStyle = theme.line;
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let at = -height; at < width; at += 5) {
    ctx.moveTo(x + at, y + height);
    ctx.lineTo(x + at + height, y);
  }
  ctx.stroke();
  ctx.restore();
}

/**
 * Draw a token's path through the blocks: a column for each block, with the chosen experts as high as their gates.
 * `path[i]` comes from Trace.choices, or is null where nothing was routed.
 */
export function drawPath(ctx, plot, { path, current, theme, only }) {
  const width = plot.width / path.length;
  hatch(ctx, plot, theme);
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  path.forEach((choice, column) => {
    if (!choice) return;
    const sum = choice.chosen.reduce((all, { gate }) => all + gate, 0);
    let y = plot.y;
    choice.chosen.forEach(({ expert, gate }) => {
      const height = plot.height * (sum ? gate / sum : 1 / choice.chosen.length);
      const rgb = expertColour(expert);
      const x = plot.x + column * width;
      ctx.globalAlpha = only === null || only === expert ? 1 : 0.25;
      ctx.fillStyle = css(rgb);
      ctx.fillRect(x, y, width - (width > 4 ? 1 : 0), height - (height > 3 ? 1 : 0));
      if (width >= 9 && height >= 10) {
        ctx.font = `600 ${width >= 13 ? 10 : 7.5}px ${FONT}`;
        ctx.fillStyle = css(inkOn(rgb));
        ctx.fillText(expert, x + (width - 1) / 2, y + height / 2);
      }
      ctx.globalAlpha = 1;
      y += height;
    });
    if (!choice.chosen.length) {
      ctx.fillStyle = theme.empty;
      ctx.fillRect(plot.x + column * width, plot.y, width, plot.height);
    }
  });
  if (current >= 0) drawMark(ctx, { x: plot.x + current * width, y: plot.y, width, height: plot.height });
}

/**
 * Draw which blocks ran at which step. Rows are the blocks of all groups, `groups` is [{row, blocks, labels}] with the
 * group's first row, and `chose(row, step)` is a bool for each sample. The shown sample fills its cell; the others leave a
 * mark at its foot.
 */
export function drawBlockPaths(ctx, plot, { groups, rows, steps, chose, sample, step, row, theme }) {
  const [cw, ch] = [plot.width / steps, plot.height / rows];
  ctx.font = `10px ${FONT}`;
  ctx.textBaseline = "middle";
  for (const group of groups) {
    const y = plot.y + group.row * ch;
    hatch(ctx, { x: plot.x, y, width: plot.width, height: group.blocks * ch }, theme);
    for (let block = 0; block < group.blocks; block++) {
      ctx.textAlign = "right";
      ctx.fillStyle = theme.text;
      if (ch >= 9 || block === 0) ctx.fillText(group.labels[block], plot.x - 5, y + (block + 0.5) * ch);
      for (let at = 0; at < steps; at++) {
        const chosen = chose(group.row + block, at);
        const x = plot.x + at * cw;
        if (chosen[sample]) {
          ctx.fillStyle = theme.accent;
          ctx.fillRect(x + 0.5, y + block * ch + 0.5, Math.max(1, cw - 1), Math.max(1, ch - 1));
        }
        if (chosen.length < 2 || cw < 5) continue;
        const mark = Math.min(4, (cw - 2) / chosen.length);
        chosen.forEach((ran, other) => {
          if (!ran || other === sample) return;
          ctx.fillStyle = chosen[sample] ? theme.ground : theme.text;
          ctx.fillRect(x + 1.5 + other * mark, y + (block + 1) * ch - 4, Math.max(1, mark - 1), 2.5);
        });
      }
    }
    if (group.row) {
      ctx.fillStyle = theme.text;
      ctx.fillRect(plot.x, y - 0.5, plot.width, 1);
    }
  }
  drawMark(ctx, { x: plot.x + step * cw, y: plot.y - 1, width: cw, height: plot.height + 2 });
  if (row >= 0) {
    ctx.strokeStyle = theme.text;
    ctx.lineWidth = 1.5;
    ctx.strokeRect(plot.x, plot.y + row * ch, plot.width, ch);
  }
}

/** Draw values from 0 to 1 as columns; null leaves a gap. */
export function drawColumns(ctx, plot, { values, current, theme }) {
  const width = plot.width / values.length;
  ctx.fillStyle = theme.empty;
  ctx.fillRect(plot.x, plot.y, plot.width, plot.height);
  values.forEach((value, column) => {
    if (value === null) return;
    ctx.fillStyle = theme.accent;
    const height = value * plot.height;
    ctx.fillRect(plot.x + column * width, plot.y + plot.height - height, Math.max(1, width - 1), height);
  });
  if (current >= 0) drawMark(ctx, { x: plot.x + current * width, y: plot.y, width, height: plot.height });
}
