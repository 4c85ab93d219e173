import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { watchLiveValues } from "../../web/live.mjs";
import { watchCosts } from "../../web/cost.mjs";
import { addReadout } from "../../web/readout.mjs";
import { loadTexts } from "../../web/text.mjs";
import { arrived, json } from "./server.mjs";
import { api } from "./comfyui/api.mjs";
import { app } from "./comfyui/app.mjs";
import { chain } from "./graphs.mjs";
import { Element, openPage } from "./page.mjs";

let requests;
let answer;

beforeEach(async () => {
  openPage();
  document.hidden = false;
  mock.timers.enable({ apis: ["setInterval"] });
  api.fetchApi = async () => json({ en: { d2m: { cost: { line: "{active} of {dense} {unit} · {percent} %" } } } });
  await loadTexts();
  requests = [];
  answer = () => cost(3e9, 0.5);
  api.fetchApi = async (path) => {
    requests.push(path);
    return answer(new URLSearchParams(path.split("?")[1]));
  };
  app.canvas = { setDirty() {} };
  watchCosts();
});

afterEach(() => mock.timers.reset());

const cost = (touched, ratio, more = {}) => json({
  touched, flops: ratio, flops_ratio: ratio, dense: { touched: 12e9, flops: 1 }, text: `${ratio}`,
  experts: 12, groups: [], ...more,
});

/** Give the node of a chain its readout; returns the element that shows the cost. */
function watched({ graph, nodes }, node = nodes.at(-1)) {
  app.rootGraph = graph;
  let shown;
  node.addDOMWidget = (name, type, element) => {
    shown = element;
    return {};
  };
  addReadout(node);
  const [row, bar] = shown.children;
  assert.ok(shown instanceof Element);
  return { label: () => row.children[0].textContent, barHidden: () => bar.hidden };
}

async function look() {
  mock.timers.tick(300);
  await arrived();
}

/** A chain whose nodes after the loader have these widgets: [class, { name: value }]. */
function controls(...given) {
  const made = chain(...given.map(([comfyClass]) => comfyClass));
  given.forEach(([, widgets], index) => {
    made.nodes[index + 1].widgets = Object.entries(widgets).map(([name, value]) => ({ name, value, options: { max: 64 } }));
  });
  return made;
}

const parameters = () => requests.map((path) => Object.fromEntries(new URLSearchParams(path.split("?")[1])));

test("the cost of a node's settings is asked for once and shown", async () => {
  const made = controls(["D2MTopK", { top_k: 2, capacity: 1 }]);
  const readout = watched(made);
  await look();
  await look();
  assert.deepEqual(parameters(), [{ model_name: "moe.safetensors", top_k: "2", capacity: "1" }]);
  assert.equal(readout.label(), "3.00 of 12.0 B · 50 %");
  assert.equal(readout.barHidden(), false);
});

test("of two nodes with one setting the last in the chain counts", async () => {
  watched(controls(["D2MTopK", { top_k: 4 }], ["D2MTopK", { top_k: 1 }]));
  await look();
  assert.equal(parameters()[0].top_k, "1");
});

test("a changed setting is asked for again, a known one is not", async () => {
  const made = controls(["D2MTopK", { top_k: 2 }]);
  watched(made);
  await look();
  for (const top_k of [3, 2]) {
    made.nodes[1].widgets[0].value = top_k;
    await look();
  }
  assert.deepEqual(parameters().map(({ top_k }) => top_k), ["2", "3"]);
});

test("under a schedule the readout spans the cheapest and the dearest value", async () => {
  const pieces = "0 - 0.5: 1 # outline\n0.5 - 0.8: 6\n0.8 - 1: 1\n\n";
  const made = controls(["D2MSchedule", { setting: "top_k", pieces }]);
  made.nodes[0].widgets[0].value = "scheduled.safetensors"; // what other tests asked for is known by now
  const readout = watched(made);
  answer = (query) => (query.get("top_k") === "1" ? cost(2e9, 0.25) : cost(4e9, 0.75));
  await look();
  assert.deepEqual(parameters().map(({ top_k }) => top_k), ["1", "6"]);
  assert.equal(readout.label(), "2.00–4.00 of 12.0 B · 25–75 %");
});

test("block counts of each group are sent as written, or else the one count", async () => {
  const made = controls(["D2MActiveBlocks", { active_blocks: 5, per_group: " 3, 4 " }]);
  watched(made);
  await look();
  made.nodes[1].widgets[1].value = "";
  await look();
  assert.deepEqual(parameters().map(({ active_blocks }) => active_blocks), ["3, 4", "5"]);
});

test("a budget stands for the settings before it, and a later Top-K for the budget", async () => {
  watched(controls(["D2MTopK", { top_k: 2 }], ["D2MActiveBlocks", { active_blocks: 1 }], ["D2MBudget", { budget: 0.65 }]));
  await look();
  watched(controls(["D2MBudget", { budget: 0.65 }], ["D2MTopK", { top_k: 5 }]));
  await look();
  assert.deepEqual(parameters(), [
    { model_name: "moe.safetensors", budget: "0.65" },
    { model_name: "moe.safetensors", top_k: "5" },
  ]);
});

test("the size of the graph's empty latent is part of the question", async () => {
  const made = controls(["D2MTopK", { top_k: 2 }]);
  made.graph.node(40, "EmptySD3LatentImage", { widgets: { width: 512, height: 768 } });
  watched(made);
  await look();
  assert.deepEqual(parameters()[0], { model_name: "moe.safetensors", top_k: "2", width: "512", height: "768" });
});

test("sliders end where the file does", async () => {
  const made = controls(["D2MActiveBlocks", { active_blocks: 2 }], ["D2MTopK", { top_k: 2 }]);
  answer = () => cost(3e9, 0.5, { experts: 12, groups: [3, 5] });
  watched(made);
  watched(made, made.nodes[1]);
  await look();
  assert.equal(made.nodes[2].widgets[0].options.max, 12);
  assert.equal(made.nodes[1].widgets[0].options.max, 5);
});

test("what the file does not have is hidden, and both renderers are told", async () => {
  const made = controls(["D2MTopK", { top_k: 2, gate: "sum", capacity: 1 }]);
  made.nodes[0].widgets[0].value = "capacity.safetensors";
  const [topK, gate, capacity] = made.nodes[1].widgets;
  capacity.options.advanced = true;
  answer = () => cost(3e9, 0.5, { experts: 0, settings: ["capacity", "gate"] });
  watched(made);
  await look();
  assert.deepEqual([topK, gate, capacity].map(({ hidden }) => Boolean(hidden)), [true, false, false]);
  assert.deepEqual([topK.options.hidden, capacity.options.advanced], [true, false]);
  assert.equal(topK.label, undefined);
});

test("a dense file in the loader is sent to the node that converts it", async () => {
  api.fetchApi = async () => json({ en: { d2m: { cost: { dense: "convert it" } } } });
  await loadTexts();
  api.fetchApi = async () => cost(12e9, 1, { is_dense: true, settings: [] });
  const made = chain();
  made.nodes[0].widgets[0].value = "flux1-dev.safetensors";
  const readout = watched(made);
  await look();
  assert.equal(readout.label(), "convert it");
  assert.equal(readout.barHidden(), true);
});

test("a file that is not there, and a node that has not run, are said in few words", async () => {
  answer = () => json({ error: "There is no gone.safetensors in diffusion_models." }, 404);
  const made = chain("D2MTopK");
  made.nodes[0].widgets[0].value = "gone.safetensors";
  const readout = watched(made);
  await look();
  assert.equal(readout.label(), "cost.no_file");
});

test("seconds a step are those of the sampler that used the MODEL, and only while its settings stay", async (t) => {
  const made = controls(["D2MTopK", { top_k: 5 }]);
  app.extensionManager.workflow = { activeWorkflow: {} };
  answer = () => cost(3e9, 0.5, { queue_running: [] });
  const sampler = made.graph.node(9, "KSampler", { inputs: { model: "MODEL" }, outputs: ["LATENT"] });
  made.graph.link(made.nodes[1], 0, sampler, "model");
  const readout = watched(made);
  await look();
  api.queuePrompt = async () => ({ prompt_id: "p" });
  watchLiveValues();
  await api.queuePrompt();
  let now = 0;
  t.mock.method(performance, "now", () => now);
  api.emit("execution_start", { prompt_id: "p" });
  for (now of [5000, 5500, 6000]) api.emit("progress", { node: "9", value: 1, max: 3 });
  api.emit("execution_success", { prompt_id: "p" });
  await look();
  assert.equal(readout.label(), "3.00 of 12.0 B · 50 % · cost.pace");
  made.nodes[1].widgets[0].value = 6;
  await look();
  assert.equal(readout.label(), "3.00 of 12.0 B · 50 %");
});

test("a model of another loader has no cost, and nothing is asked", async () => {
  const made = chain("D2MTopK");
  made.nodes[0].comfyClass = "CheckpointLoaderSimple";
  const readout = watched(made);
  await look();
  assert.deepEqual(requests, []);
  assert.equal(readout.label(), "");
  assert.equal(readout.barHidden(), true);
});

test("the server's error is shown in the cost's place", async () => {
  answer = () => json({ error: "moe.safetensors is no FLUX-MoE" }, 400);
  const made = chain("D2MTopK");
  made.nodes[0].widgets[0].value = "other.safetensors";
  const readout = watched(made);
  await look();
  assert.equal(readout.label(), "moe.safetensors is no FLUX-MoE");
  assert.equal(readout.barHidden(), true);
});

test("a server that was away is asked again when something changes", async () => {
  const made = controls(["D2MTopK", { top_k: 7 }]);
  const readout = watched(made);
  answer = () => { throw new Error("network down"); };
  await look();
  assert.equal(readout.label(), "network down");
  answer = () => cost(3e9, 0.5);
  made.nodes[1].widgets[0].value = 8;
  await look();
  made.nodes[1].widgets[0].value = 7;
  await look();
  assert.equal(readout.label(), "3.00 of 12.0 B · 50 %");
});

test("a converted model's cost is asked for again after every run", async () => {
  const made = chain("D2MTopK");
  Object.assign(made.nodes[0], { comfyClass: "D2MConvertFlux", widgets: [] });
  watched(made);
  await look();
  await look();
  assert.deepEqual(parameters(), [{ node: "1" }]);
  api.emit("execution_success", {});
  await look();
  assert.equal(requests.length, 2);
});
