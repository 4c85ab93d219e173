import assert from "node:assert/strict";
import { test } from "node:test";

import { executionId, modelChain, places, promptWidgets, roundPromoted, source, valueOf } from "../../web/graph.mjs";
import { Graph, chain, model } from "./graphs.mjs";

const MUTED = 2;
const BYPASSED = 4;

const ids = (graph) => [...places(graph)].map(executionId);
const chainOf = (node, path = []) => [...modelChain({ node, path })].map(executionId);

/** A subgraph with a Top-K inside, whose MODEL and top_k come in from outside; used by two nodes of the graph. */
function promoted() {
  const inner = new Graph();
  const topK = inner.node(5, "D2MTopK", {
    inputs: { model: "MODEL", top_k: "INT" }, outputs: ["MODEL"], widgets: { top_k: 2 },
  });
  inner.linkInput(0, topK, "model");
  inner.linkInput(1, topK, "top_k");
  inner.linkOutput(topK, 0, 0);
  const { graph, nodes: [loader] } = chain();
  const outside = { inputs: { model: "MODEL", top_k: "INT" }, outputs: ["MODEL"] };
  const instances = [12, 13].map((id, index) => graph.instance(id, inner, { ...outside, widgets: { top_k: 3 + index } }));
  graph.link(loader, 0, instances[0], "model");
  graph.link(instances[0], 0, instances[1], "model");
  return { graph, inner, topK, instances };
}

test("muted and bypassed nodes have no place, and a node inside a subgraph has one for each instance", () => {
  const { graph } = promoted();
  graph.node(20, "KSampler", { mode: MUTED });
  graph.node(21, "KSampler", { mode: BYPASSED });
  assert.deepEqual(ids(graph), ["1", "12:5", "13:5"]);
});

test("the MODEL is followed through reroutes and bypassed nodes up to the loader", () => {
  const { graph, nodes } = chain("D2MTopK", "Reroute", "D2MSchedule", "D2MTraceRouting");
  nodes[2].isVirtualNode = true;
  nodes[3].mode = BYPASSED;
  assert.deepEqual(chainOf(nodes.at(-1)), ["5", "2", "1"]);
  nodes[1].mode = MUTED;
  assert.deepEqual(chainOf(nodes.at(-1)), ["5"]);
  assert.equal(graph.nodes.length, 5);
});

test("a bypassed node passes on the input of the output's type", () => {
  const { graph, nodes: [loader] } = chain();
  const node = graph.node(2, "Other", { inputs: { vae: "VAE", model: "MODEL" }, outputs: ["MODEL"], mode: BYPASSED });
  const after = graph.node(3, "D2MTopK", model);
  graph.link(loader, 0, node, "model");
  graph.link(node, 0, after, "model");
  assert.deepEqual(chainOf(after), ["3", "1"]);
});

test("a Get node leads to what its Set node got", () => {
  const { graph, nodes: [loader] } = chain();
  const set = graph.node(2, "SetNode", { ...model, isVirtualNode: true });
  graph.link(loader, 0, set, "model");
  const get = graph.node(3, "GetNode", {
    outputs: ["MODEL"], isVirtualNode: true, resolveVirtualOutput: () => ({ node: set, slot: 0 }),
  });
  const after = graph.node(4, "D2MTopK", model);
  graph.link(get, 0, after, "model");
  assert.deepEqual(chainOf(after), ["4", "1"]);
});

test("the MODEL is followed into subgraphs and out of them", () => {
  const { topK, instances } = promoted();
  assert.deepEqual(chainOf(topK, [instances[1]]), ["13:5", "12:5", "1"]);
});

test("a circle of links ends", () => {
  const { graph, nodes } = chain("Reroute", "Reroute");
  for (const node of nodes.slice(1)) node.isVirtualNode = true;
  graph.link(nodes[2], 0, nodes[1], "model");
  assert.equal(source({ node: nodes[2], path: [] }, nodes[2].inputs[0]), null);
});

test("a promoted widget has the value of its instance", () => {
  const { topK, instances } = promoted();
  assert.equal(valueOf({ node: topK, path: [instances[0]] }, "top_k"), 3);
  assert.equal(valueOf({ node: topK, path: [instances[1]] }, "top_k"), 4);
});

test("a linked widget has the value of the primitive, or none when a node computes it", () => {
  const { graph, nodes: [, topK] } = chain("D2MTopK");
  topK.inputs.push({ name: "top_k", type: "INT", link: null, widget: { name: "top_k" } });
  topK.widgets.push({ name: "top_k", value: 2 });
  assert.equal(valueOf({ node: topK, path: [] }, "top_k"), 2);
  const primitive = graph.node(8, "PrimitiveNode", { outputs: ["INT"], widgets: { value: 7 }, isVirtualNode: true });
  graph.link(primitive, 0, topK, "top_k");
  assert.equal(valueOf({ node: topK, path: [] }, "top_k"), 7);
  graph.link(graph.node(9, "MathInt", { outputs: ["INT"] }), 0, topK, "top_k");
  assert.equal(valueOf({ node: topK, path: [] }, "top_k"), undefined);
  assert.equal(valueOf({ node: topK, path: [] }, "capacity"), undefined);
});

test("promoted sliders of whole numbers are rounded, others are left alone", () => {
  const { graph, instances } = promoted();
  instances[0].widgets[0].value = 3.7;
  roundPromoted(graph);
  assert.deepEqual(instances.map(({ widgets }) => widgets[0].value), [4, 4]);
});

test("widgets that are not sent with the prompt are left out", () => {
  const widgets = [
    { name: "top_k", options: {} }, { name: "d2m_readout", options: { serialize: false } }, { name: "", options: {} },
  ];
  assert.deepEqual(promptWidgets({ widgets }).map(({ name }) => name), ["top_k"]);
  assert.deepEqual(promptWidgets({}), []);
});
