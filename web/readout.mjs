/** The line at the foot of this pack's nodes: the model's cost, and a mark while a live value is in use. */

const STYLE = `
.d2m-readout { display: flex; flex-direction: column; justify-content: center; gap: 3px; overflow: hidden;
  box-sizing: border-box; min-height: 26px; padding: 2px 4px; font: 11px/1.35 system-ui, sans-serif; }
.d2m-readout > div:first-child { display: flex; gap: 6px; }
.d2m-readout .d2m-cost { flex: 1; min-width: 0; overflow: hidden; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 2; color: var(--input-text, #ddd); }
.d2m-readout .d2m-cost.d2m-quiet { color: var(--descrip-text, #999); }
.d2m-readout .d2m-live { color: var(--input-text, #ddd); white-space: nowrap; }
.d2m-readout .d2m-live:not(:empty)::before { content: "● "; color: #22c55e; }
.d2m-readout .d2m-bar { height: 3px; border-radius: 2px;
  background: color-mix(in srgb, var(--input-text, #ddd) 20%, transparent); }
.d2m-readout .d2m-bar > div { height: 100%; border-radius: 2px; background: #3b82f6; }
`;
const HEIGHT = 58; // two lines and the bar
const MARGIN = 8;
const readouts = new WeakMap();

export function addStyle() {
  document.head.appendChild(document.createElement("style")).textContent = STYLE;
}

/** Add a readout to a node. Neither the saved workflow nor the prompt contains it. */
export function addReadout(node) {
  const [element, row, cost, live, bar, filled] = Array.from({ length: 6 }, () => document.createElement("div"));
  element.className = "d2m-readout";
  [cost.className, live.className, bar.className] = ["d2m-cost", "d2m-live", "d2m-bar"];
  row.append(cost, live);
  bar.append(filled);
  bar.hidden = true;
  element.append(row, bar);
  const widget = node.addDOMWidget("d2m_readout", "D2M_READOUT", element, {
    serialize: false, // not in the prompt
    margin: MARGIN,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false; // not in the workflow
  readouts.set(node, { cost, live, bar, filled });
}

export const hasReadout = (node) => readouts.has(node);

/** Show a cost. `share` of the dense model's cost fills the bar; without it the bar is hidden and the label dimmed. */
export function showCost(node, { label = "", title = label, share = null } = {}) {
  const { cost, bar, filled } = readouts.get(node);
  [cost.textContent, cost.title, bar.hidden] = [label, title, share === null];
  cost.classList.toggle("d2m-quiet", share === null);
  filled.style.width = `${Math.min(1, share ?? 0) * 100}%`;
}

/** Show that a live value is in use; an empty label removes the mark. */
export function showLive(node, label, title = label) {
  const readout = readouts.get(node);
  if (readout) [readout.live.textContent, readout.live.title] = [label, title];
}
