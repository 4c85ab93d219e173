// Graphs as ComfyUI's frontend holds them, as far as modules of web/ read them.

export class Graph {
  constructor() {
    Object.assign(this, { nodes: [], links: [], inputNode: { slots: [] }, outputNode: { slots: [] } });
  }

  getNodeById(id) {
    return this.nodes.find((node) => node.id === id);
  }

  getLink(id) {
    return this.links[id];
  }

  /** A node; `inputs` { name: type }, `outputs` [type], `widgets` { name: value }. A widget input has its widget's name. */
  node(id, comfyClass, { inputs = {}, outputs = [], widgets = {}, ...more } = {}) {
    const node = {
      id, comfyClass, mode: 0, graph: this,
      inputs: Object.entries(inputs).map(([name, type]) => ({
        name, type, link: null, ...(name in widgets ? { widget: { name } } : {}),
      })),
      outputs: outputs.map((type) => ({ type })),
      widgets: Object.entries(widgets).map(([name, value]) => ({ name, value, options: {} })),
      ...more,
    };
    this.nodes.push(node);
    return node;
  }

  /** Link an output of a node to an input. */
  link(from, slot, to, input) {
    const target = to.inputs.find(({ name }) => name === input);
    const link = {
      origin_id: from.id, origin_slot: slot,
      resolve: () => ({ outputNode: from, link }),
    };
    target.link = this.links.push(link) - 1;
    return link;
  }

  /** Link the subgraph's own input number `slot` to an input of a node inside. */
  linkInput(slot, to, input) {
    const target = to.inputs.find(({ name }) => name === input);
    target.link = this.links.push({ originIsIoNode: true, origin_slot: slot }) - 1;
  }

  /** Link an output of a node inside to the subgraph's own output number `index`. */
  linkOutput(from, slot, index) {
    const link = { origin_id: from.id, origin_slot: slot };
    this.outputNode.slots[index] = { getLinks: () => [{ resolve: () => ({ outputNode: from, link }) }] };
  }

  /** A node that stands for a subgraph. */
  instance(id, subgraph, options) {
    return this.node(id, "subgraph", {
      isSubgraphNode: () => true,
      subgraph,
      getWidgetFromSlot(slot) {
        return this.widgets.find(({ name }) => name === slot.name);
      },
      ...options,
    });
  }
}

export const model = { inputs: { model: "MODEL" }, outputs: ["MODEL"] };

/** A loader and, after it, nodes of the given classes; { graph, nodes }, the loader first. */
export function chain(...classes) {
  const graph = new Graph();
  const nodes = [graph.node(1, "D2MLoadFluxMoE", { outputs: ["MODEL"], widgets: { model_name: "moe.safetensors" } })];
  for (const comfyClass of classes) {
    const node = graph.node(nodes.length + 1, comfyClass, model);
    graph.link(nodes.at(-1), 0, node, "model");
    nodes.push(node);
  }
  return { graph, nodes };
}
