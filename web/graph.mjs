/**
 * The graph as ComfyUI will run it: nodes inside subgraphs with their execution ids, the values that their widgets will
 * have in the prompt, and where a MODEL comes from.
 *
 * A place is { node, path }: a node, and the subgraph nodes that lead to it. One node of a subgraph has as many places
 * as that subgraph has instances.
 */

const NEVER = 2; // node.mode of a muted node
const BYPASS = 4;
const DEEPEST = 200; // links followed through subgraphs, reroutes and bypassed nodes: a loop ends here

/** Every place at which a node of `graph` runs. */
export function* places(graph, path = []) {
  for (const node of graph.nodes) {
    if (node.mode === NEVER || node.mode === BYPASS) continue;
    if (node.isSubgraphNode?.()) yield* places(node.subgraph, [...path, node]);
    else yield { node, path };
  }
}

/** The id of a place in the prompt, such as "5" or "12:5". */
export function executionId({ node, path }) {
  return [...path, node].map(({ id }) => id).join(":");
}

/** The widgets of a node that stand in the prompt. */
export function promptWidgets(node) {
  return (node.widgets ?? []).filter((widget) => widget.name && widget.options?.serialize !== false);
}

/**
 * The value that a widget will have in the prompt. Undefined: there is no such widget, or another node gives its value.
 *
 * A promoted widget has its value on the subgraph node, in ComfyUI's newer frontends one for each instance.
 */
export function valueOf(place, name) {
  const input = place.node.inputs?.find((slot) => slot.widget?.name === name);
  const widget =
    input?.link == null ? place.node.widgets?.find((it) => it.name === name) : source(place, input)?.widget;
  return widget?.value;
}

/** On the canvas a promoted slider of whole numbers gives fractions, which ComfyUI would cut off: round them. */
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

/** What gives an input its value: { place, slot } of a node's output, or { widget }; null if nothing does. */
export function source({ node, path }, input, depth = 0) {
  const link = input.link == null ? null : node.graph?.getLink(input.link);
  if (!link || depth > DEEPEST) return null;
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

function output(place, slot, depth) {
  const { node, path } = place;
  if (node.mode === NEVER) return null;
  if (node.mode === BYPASS) {
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
  const elsewhere = node.resolveVirtualOutput?.(slot); // such as the Get of a Set
  if (elsewhere) return output({ node: elsewhere.node, path }, elsewhere.slot, depth + 1);
  const through = node.inputs?.[slot] ?? node.inputs?.[0];
  if (through) return source(place, through, depth + 1);
  return node.widgets?.length ? { widget: node.widgets[0] } : null; // a primitive
}

/** A place, and those that its MODEL comes from, one after the other up to the loader. */
export function* modelChain(start) {
  const seen = new Set();
  for (let place = start; place && !seen.has(executionId(place)); ) {
    yield place;
    seen.add(executionId(place));
    const input = place.node.inputs?.find(({ type }) => type === "MODEL");
    place = input && source(place, input)?.place;
  }
}
