// The Expert Mask node before a trace: finds, reads, writes and inserts it.

import { executionId, modelChain, places, source, valueOf } from "../graph.mjs";

const MASK = "D2MExpertMask";
const WIDGET = "mask";
const GAP = 40; // between nodes of the canvas

/** The place of the Trace Routing node behind an input of the map, or null. */
export function tracePlace(app, map, input = "trace") {
  for (const place of places(app.rootGraph ?? app.graph)) {
    if (place.node !== map) continue;
    const slot = map.inputs.find(({ name }) => name === input);
    return (slot && source(place, slot)?.place) ?? null;
  }
  return null;
}

/** The place of the nearest Expert Mask node before a Trace Routing node, or null. */
export function maskPlace(trace) {
  if (!trace) return null;
  for (const place of modelChain(trace)) if (place.node.comfyClass === MASK) return place;
  return null;
}

export const idOf = executionId;

export function maskText(mask) {
  return mask ? String(valueOf(mask, WIDGET) ?? "") : "";
}

/** Write rules as a user would, into the widget itself or into the subgraph node's promoted one. False if there is none. */
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

/** Insert an Expert Mask node before a Trace Routing node, in the same graph; null if that has no MODEL. */
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
  mask.pos = freePosition(graph, mask, [node.pos[0] - mask.size[0] - GAP, node.pos[1]]);
  const into = mask.inputs.findIndex(({ type }) => type === "MODEL");
  if (subgraphInput) subgraphInput.connect(mask.inputs[into], mask);
  else outputNode.connect(slot, mask, into);
  mask.connect(0, node, index);
  graph.afterChange?.();
  app.canvas?.setDirty?.(true, true);
  return { node: mask, path: trace.path };
}

/** The given position, or the first one below it, at which a node covers no other node. */
function freePosition(graph, node, [x, y]) {
  const others = graph.nodes.filter((other) => other !== node);
  const blocking = (top) => others.find((other) => other.pos[0] < x + node.size[0] && other.pos[0] + other.size[0] > x
    && other.pos[1] < top + node.size[1] + GAP && other.pos[1] + other.size[1] + GAP > top);
  let top = y;
  for (let other = blocking(top); other; other = blocking(top)) top = other.pos[1] + other.size[1] + 2 * GAP;
  return [x, top];
}
