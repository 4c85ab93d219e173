/** Widgets of this pack's nodes, fitted to the file: sliders end where the file does, and what it does not have is hidden. */

import { app } from "../../scripts/app.js";

const SETTINGS = { D2MTopK: ["top_k", "gate", "capacity"] }; // node → the widgets that a file may lack

/** Fit the widgets of a node to the server's answer on a file: its `experts`, `groups` and `settings`. */
export function fitWidgets(node, { experts, groups, settings }) {
  const maximum = { top_k: experts, active_blocks: groups?.length ? Math.max(...groups) : undefined };
  for (const widget of node.widgets ?? []) {
    const change = { max: maximum[widget.name] || widget.options.max };
    if (settings?.length && SETTINGS[node.comfyClass]?.includes(widget.name)) {
      change.hidden = !settings.includes(widget.name);
      // The one slider of a file with capacity routers is not among the advanced widgets.
      if (widget.name === "capacity" && !change.hidden) change.advanced = false;
    }
    fit(widget, change);
  }
}

function fit(widget, change) {
  const differs = ([name, value]) => value !== undefined && (widget.options[name] ?? false) !== value;
  if (!Object.entries(change).some(differs)) return;
  Object.assign(widget.options, change); // read by Nodes 2.0
  if ("hidden" in change) widget.hidden = change.hidden; // and by the canvas
  if ("advanced" in change) widget.advanced = change.advanced;
  drawAgain(widget);
}

/** Have both renderers draw a widget: Nodes 2.0 notices changes of a label, not those of options. */
function drawAgain(widget) {
  const { label } = widget;
  widget.label = `${label ?? widget.name} `;
  widget.label = label;
  app.canvas.setDirty(true, true);
}
