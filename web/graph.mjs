/**
 * The graph as ComfyUI will run it: nodes inside subgraphs with their execution ids, the values of their widgets in the
 * prompt, and the origin of a MODEL.
 *
 * A place is { node, path }: a node, and the subgraph nodes that contain it, from the outside in. A node inside a subgraph
 * has one place for each instance of that subgraph.
 */

const MUTED = 2; // node.mode of a muted node
const BYPASSED = 4;
const MAX_DEPTH = 200; // number of links that are followed: a loop of links ends here

/** Every place at which a node of `graph` runs. */
export function* places(graph, path = []) {
  for (const node of graph.nodes) {
    if (node.mode === MUTED || node.mode === BYPASSED) continue;
    if (node.isSubgraphNode?.()) yield* places(node.subgraph, [...path, node]);
    else yield { node, path };
  }
}

/** The id of a place in the prompt, such as "5" or "12:5". */
export function executionId({ node, path }) {
  return [...path, node].map(({ id }) => id).join(":");
}

/** The widgets of a node whose values are sent with the prompt. */
export function promptWidgets(node) {
  return (node.widgets ?? []).filter((widget) => widget.name && widget.options?.serialize !== false);
}

/**
 * The value that a widget will have in the prompt; undefined if there is no such widget, or if another node computes it.
 *
 * The value of a promoted widget lies on the subgraph node; in ComfyUI's newer frontends each instance has its own.
 */
export function valueOf(place, name) {
  const input = place.node.inputs?.find((slot) => slot.widget?.name === name);
  const widget =
    input?.link == null ? place.node.widgets?.find((it) => it.name === name) : source(place, input)?.widget;
  return widget?.value;
}

/** Round the values of promoted sliders of whole numbers: the canvas gives fractions, which ComfyUI would cut off. */
export function roundPromoted(graph) {
  for (const { node, path } of places(graph)) {
    for (const input of path.length ? node.inputs : []) {
      const widget = input.type === "INT" && source({ node, path }, input)?.widget;
      if (widget && typeof widget.value === "number" && !Number.isInteger(widget.value)) {
        widget.value = Math.round(widget.value);
      }
    }
  }
}

/** The source of an input: { place, slot } of a node's output, or { widget }; null if it is not connected. */
export function source({ node, path }, input, depth = 0) {
  const link = input.link == null ? null : node.graph?.getLink(input.link);
  if (!link || depth > MAX_DEPTH) return null;
  if (!link.originIsIoNode) {
    const from = node.graph.getNodeById(link.origin_id);
    return from && output({ node: from, path }, link.origin_slot, depth + 1);
  }
  const host = path.at(-1);
  const outer = host?.inputs[link.origin_slot];
  if (!outer) return null;
  if (outer.link != null) return source({ node: host, path: path.slice(0, -1) }, outer, depth + 1);
  const widget = host.getWidgetFromSlot(outer);
  return widget ? { widget } : null;
}

/** The source behind an output: bypassed nodes, subgraphs and virtual nodes such as reroutes only pass it on. */
function output(place, slot, depth) {
  const { node, path } = place;
  if (node.mode === MUTED) return null;
  if (node.mode === BYPASSED) {
    const type = node.outputs[slot]?.type;
    const passed = node.inputs[slot]?.type === type ? node.inputs[slot] : node.inputs.find((it) => it.type === type);
    return passed ? source(place, passed, depth) : null;
  }
  if (node.isSubgraphNode?.()) {
    const inner = node.subgraph.outputNode.slots[slot]?.getLinks?.().at(0)?.resolve(node.subgraph);
    return inner?.outputNode
      ? output({ node: inner.outputNode, path: [...path, node] }, inner.link.origin_slot, depth + 1)
      : null;
  }
  if (!node.isVirtualNode) return { place, slot };
  const elsewhere = node.resolveVirtualOutput?.(slot); // for example the Set node of a Get node
  if (elsewhere) return output({ node: elsewhere.node, path }, elsewhere.slot, depth + 1);
  const through = node.inputs?.[slot] ?? node.inputs?.[0];
  if (through) return source(place, through, depth + 1);
  return node.widgets?.length ? { widget: node.widgets[0] } : null; // a primitive node
}

/** Yield a place, and then each place from which its MODEL (or the MODEL of its GUIDER) comes, up to the loader. */
export function* modelChain(start) {
  const seen = new Set();
  for (let place = start; place && !seen.has(executionId(place)); ) {
    yield place;
    seen.add(executionId(place));
    const { inputs = [] } = place.node;
    const input = inputs.find(({ type }) => type === "MODEL") ?? inputs.find(({ type }) => type === "GUIDER");
    place = input && source(place, input)?.place;
  }
}
