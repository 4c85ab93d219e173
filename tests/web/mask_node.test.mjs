import assert from "node:assert/strict";
import { test } from "node:test";

import { idOf, insertMask, maskPlace, maskText, tracePlace, writeMask } from "../../web/expert_map/mask_node.mjs";
import { Graph, chain, model } from "./graphs.mjs";

/** A chain, and an Expert Map after its last node, which is the Trace node. */
function mapped(...classes) {
  const { graph, nodes } = chain(...classes, "D2MTraceRouting");
  const map = graph.node(99, "D2MExpertMap", { inputs: { trace: "D2M_TRACE", compare: "D2M_TRACE" } });
  graph.link(nodes.at(-1), 1, map, "trace");
  return { app: { rootGraph: graph }, graph, map, trace: { node: nodes.at(-1), path: [] } };
}

test("the mask nearest before the trace is found, whatever stands between them", () => {
  const { app, map } = mapped("D2MExpertMask", "D2MExpertMask", "D2MTopK");
  assert.equal(idOf(maskPlace(tracePlace(app, map))), "3");
});

test("without a trace or a mask there is nothing to write to", () => {
  const { app, map } = mapped("D2MTopK");
  assert.equal(maskPlace(tracePlace(app, map)), null);
  assert.equal(tracePlace(app, map, "compare"), null);
  assert.equal(maskPlace(null), null);
  assert.equal(maskText(null), "");
});

test("rules are written to the widget, which is told of them as after a user's edit", () => {
  const { app, graph, trace } = mapped("D2MExpertMask");
  const node = graph.getNodeById(2);
  const heard = [];
  node.widgets.push({ name: "mask", value: "*: 1=0", callback: (...given) => heard.push(given) });
  const mask = maskPlace(trace);
  assert.equal(maskText(mask), "*: 1=0");
  assert.equal(writeMask(app, mask, "*: 2=0"), true);
  assert.equal(node.widgets[0].value, "*: 2=0");
  assert.equal(heard[0][0], "*: 2=0");
  assert.equal(heard[0][2], node);
});

test("rules of a promoted widget are written to the subgraph's node", () => {
  const inner = new Graph();
  const mask = inner.node(5, "D2MExpertMask", { inputs: { mask: "STRING" }, widgets: { mask: "inner" } });
  inner.linkInput(0, mask, "mask");
  const instance = new Graph().instance(12, inner, { inputs: { mask: "STRING" }, widgets: { mask: "outer" } });
  assert.equal(writeMask({}, { node: mask, path: [instance] }, "*: 2=0"), true);
  assert.equal(instance.widgets[0].value, "*: 2=0");
  assert.equal(mask.widgets[0].value, "inner");
});

test("rules that another node computes cannot be written", () => {
  const graph = new Graph();
  const mask = graph.node(5, "D2MExpertMask", { inputs: { mask: "STRING" }, widgets: { mask: "own" } });
  graph.link(graph.node(6, "Concat", { outputs: ["STRING"] }), 0, mask, "mask");
  assert.equal(writeMask({}, { node: mask, path: [] }, "*: 2=0"), false);
  assert.equal(mask.widgets[0].value, "own");
});

test("a new mask is linked between the trace and its model, below the nodes that it would cover", () => {
  const { app, graph, trace } = mapped("D2MTopK");
  for (const node of graph.nodes) Object.assign(node, { pos: [500, 0], size: [200, 100] });
  graph.getNodeById(2).pos = [260, 0];
  graph.add = (node) => graph.nodes.push(Object.assign(node, { id: 50, graph }));
  const connect = (from) => (slot, to, input) => graph.link(from, slot, to, to.inputs[input].name);
  for (const node of graph.nodes) node.connect = connect(node);
  const created = { comfyClass: "D2MExpertMask", ...new Graph().node(0, "", model), size: [200, 80] };
  const connectCreated = connect(created);
  created.connect = (slot, to, input) => connectCreated(slot, to, input);
  const mask = insertMask(app, { createNode: () => Object.assign(created, { comfyClass: "D2MExpertMask" }) }, trace);
  assert.equal(idOf(mask), "50");
  assert.equal(maskPlace(trace).node, created);
  assert.equal(graph.getLink(created.inputs[0].link).origin_id, 2);
  assert.deepEqual(created.pos, [260, 180]);
});

test("no mask is made where nothing feeds the trace", () => {
  const graph = new Graph();
  const trace = graph.node(1, "D2MTraceRouting", model);
  const createNode = () => assert.fail("a node was made");
  assert.equal(insertMask({}, { createNode }, { node: trace, path: [] }), null);
});
