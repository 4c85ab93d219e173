// Colours of the expert map. The IMAGE output, which Python draws, uses the same colours, and a test compares them.

// Twelve colours that are distinguishable under protanopia, deuteranopia and tritanopia: the 12-colour palette of
// M. Krzywinski, "Color palettes for color blindness", in its published order.
export const EXPERT_COLOURS = [
  "#9f0162", "#009f81", "#ff5aaf", "#00fccf", "#8400cd", "#008df9",
  "#00c2f9", "#ffb2fd", "#a40122", "#e20134", "#ff6e3a", "#ffc33b",
];
// From the 13th expert on the colours repeat, first mixed half with white, then half with black.
export const ROUNDS = [null, [255, 255, 255], [0, 0, 0]];

const BASE = EXPERT_COLOURS.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

/** The colour of an expert as [r, g, b], 0 to 255. */
export function expertColour(expert) {
  const base = BASE[expert % BASE.length];
  const mix = ROUNDS[Math.floor(expert / BASE.length) % ROUNDS.length];
  return mix === null ? base : base.map((value, i) => Math.round((value + mix[i]) / 2));
}

export function css([r, g, b], alpha = 1) {
  return alpha === 1 ? `rgb(${r},${g},${b})` : `rgba(${r},${g},${b},${alpha})`;
}

/** Relative luminance (WCAG 2) of [r, g, b]. */
export function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => {
    const v = value / 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Contrast ratio (WCAG 2) of two colours, 1 to 21. */
export function contrast(one, other) {
  const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}

/** Black or white, whichever has more contrast to the colour. */
export function inkOn(rgb) {
  return contrast(rgb, [0, 0, 0]) >= contrast(rgb, [255, 255, 255]) ? [0, 0, 0] : [255, 255, 255];
}

// Every 32nd colour of Cividis (Nuñez, Anderton, Renslow 2018), from dark to light: shares of load.
const CIVIDIS = [
  [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111],
  [125, 124, 120], [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56],
];

/** The colour of a share between 0 and 1. */
export function sequential(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  return CIVIDIS[low].map((value, i) => Math.round(value + (CIVIDIS[low + 1][i] - value) * (at - low)));
}
