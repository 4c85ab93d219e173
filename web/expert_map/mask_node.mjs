// The Expert mask node that a trace has passed, read and written; and a new one where there is none.

import { executionId, modelChain, places, source, valueOf } from "../graph.mjs";

const MASK = "D2MExpertMask";
const WIDGET = "mask";
const GAP = 40; // between nodes of the canvas

/** The Trace node behind an input of the map, as a place of the graph, or null. */
export function tracePlace(app, map, input = "trace") {
  for (const place of places(app.rootGraph ?? app.graph)) {
    if (place.node !== map) continue;
    const slot = map.inputs.find(({ name }) => name === input);
    return (slot && source(place, slot)?.place) ?? null;
  }
  return null;
}

/** The Expert mask nearest before the Trace node, as a place, or null. */
export function maskPlace(trace) {
  if (!trace) return null;
  for (const place of modelChain(trace)) if (place.node.comfyClass === MASK) return place;
  return null;
}

export const idOf = executionId;

export function maskText(mask) {
  return mask ? String(valueOf(mask, WIDGET) ?? "") : "";
}

/** Writes the rules as a user would: into the widget that gives them (a promoted one stands on its subgraph's node). */
export function writeMask(app, mask, text) {
  const input = mask.node.inputs?.find((slot) => slot.widget?.name === WIDGET);
  const own = mask.node.widgets?.find(({ name }) => name === WIDGET);
  const widget = input?.link == null ? own : source(mask, input)?.widget;
  if (!widget) return false;
  widget.value = text;
  widget.callback?.(text, app.canvas, widget.node ?? mask.node);
  app.canvas?.setDirty?.(true, true);
  return true;
}

/** A new Expert mask between the Trace node and what feeds it, in the Trace node's graph; null if nothing feeds it. */
export function insertMask(app, liteGraph, trace) {
  const { node } = trace;
  const { graph } = node;
  const index = node.inputs.findIndex(({ type }) => type === "MODEL");
  const link = node.inputs[index]?.link == null ? null : graph.getLink(node.inputs[index].link);
  const mask = link && liteGraph.createNode(MASK);
  if (!mask) return null;
  const { outputNode, subgraphInput } = link.resolve(graph);
  const slot = link.origin_slot;
  graph.beforeChange?.();
  graph.add(mask);
  mask.pos = free(graph, mask, [node.pos[0] - mask.size[0] - GAP, node.pos[1]]);
  const into = mask.inputs.findIndex(({ type }) => type === "MODEL");
  if (subgraphInput) subgraphInput.connect(mask.inputs[into], mask);
  else outputNode.connect(slot, mask, into);
  mask.connect(0, node, index);
  graph.afterChange?.();
  app.canvas?.setDirty?.(true, true);
  return { node: mask, path: trace.path };
}

/** The place at `pos`, or the first one below it, where a node covers no other. */
function free(graph, node, [x, y]) {
  const others = graph.nodes.filter((other) => other !== node);
  const blocking = (top) => others.find((other) => other.pos[0] < x + node.size[0] && other.pos[0] + other.size[0] > x
    && other.pos[1] < top + node.size[1] + GAP && other.pos[1] + other.size[1] + GAP > top);
  let top = y;
  for (let other = blocking(top); other; other = blocking(top)) top = other.pos[1] + other.size[1] + 2 * GAP;
  return [x, top];
}
