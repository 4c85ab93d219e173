import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { onLive, watchLiveValues } from "../../web/live.mjs";
import { arrived, json } from "./server.mjs";
import { api } from "./comfyui/api.mjs";
import { app } from "./comfyui/app.mjs";
import { chain } from "./graphs.mjs";

let sent;
let answer;
let running; // what the server's queue holds
let heard;
let errors;
let made;
let watching = false;

beforeEach(async () => {
  [sent, heard, errors, running] = [[], [], [], []];
  answer = () => json({ applied: true });
  api.fetchApi = async (path, options) => {
    if (path === "/queue") return json({ queue_running: running });
    sent.push(JSON.parse(options.body));
    return answer();
  };
  made = chain("D2MTopK", "D2MSchedule");
  made.nodes[1].widgets = [{ name: "top_k", value: 2 }];
  made.nodes[2].widgets = [{ name: "pieces", value: "0 - 1: 2" }];
  app.rootGraph = made.graph;
  app.extensionManager = {
    workflow: { activeWorkflow: { name: "first" } },
    toast: { add: (message) => errors.push(message) },
  };
  mock.timers.enable({ apis: ["setInterval"] });
  if (!watching) {
    api.queuePrompt = async () => ({ prompt_id: "p1" });
    watchLiveValues();
    onLive((place, values) => heard.push(place ? [place.node.id, values] : null));
    watching = true;
  }
  await api.queuePrompt(0, {});
  await arrived();
  heard.length = 0;
  api.emit("execution_start", { prompt_id: "p1" });
});

afterEach(() => {
  api.emit("execution_success", {});
  mock.timers.reset();
});

async function looks(count = 1) {
  for (let look = 0; look < count; look++) {
    mock.timers.tick(100);
    await arrived();
  }
}

test("a number is sent at once, once", async () => {
  made.nodes[1].widgets[0].value = 5;
  await looks(3);
  assert.deepEqual(sent, [{ prompt_id: "p1", nodes: ["2"], values: { top_k: 5 } }]);
  assert.deepEqual(heard, [[2, { top_k: 5 }]]);
});

test("nothing is sent when nothing changes", async () => {
  await looks(3);
  assert.deepEqual(sent, []);
});

test("a text is sent when it has stood unchanged for a while", async () => {
  const [widget] = made.nodes[2].widgets;
  for (const value of ["0 - 1: ", "0 - 1: 4"]) {
    widget.value = value;
    await looks(3);
  }
  assert.deepEqual(sent, []);
  await looks(6);
  assert.deepEqual(sent, [{ prompt_id: "p1", nodes: ["3"], values: { pieces: "0 - 1: 4" } }]);
});

test("what is changed in another workflow's tab is not sent", async () => {
  app.extensionManager.workflow.activeWorkflow = { name: "second" };
  await looks();
  made.nodes[1].widgets[0].value = 5;
  await looks();
  assert.deepEqual(sent, []);
});

test("a graph that was reloaded is waited for, since it may be another workflow", async () => {
  const reloaded = chain("D2MTopK", "D2MSchedule");
  reloaded.nodes[1].widgets = [{ name: "top_k", value: 7 }];
  reloaded.nodes[2].widgets = made.nodes[2].widgets;
  app.rootGraph = reloaded.graph;
  await looks(5);
  assert.deepEqual(sent, []);
  await looks(3);
  assert.deepEqual(sent.map(({ values }) => values), [{ top_k: 7 }]);
});

test("equal changes of several nodes go in one request", async () => {
  const other = made.graph.node(9, "D2MTopK");
  other.widgets = [{ name: "top_k", value: 2 }];
  await looks();
  made.nodes[1].widgets[0].value = other.widgets[0].value = 3;
  await looks();
  assert.deepEqual(sent, [{ prompt_id: "p1", nodes: ["2", "9"], values: { top_k: 3 } }]);
});

test("a refused value is said once in a run", async () => {
  answer = () => json({ error: "top_k is 99; the file has 12 experts" }, 400);
  for (const value of [99, 98]) {
    made.nodes[1].widgets[0].value = value;
    await looks();
  }
  assert.equal(sent.length, 2);
  assert.deepEqual(errors.map(({ detail }) => detail), ["top_k is 99; the file has 12 experts"]);
  assert.deepEqual(heard, []);
});

test("the run's end stops the sending and is told to listeners", async () => {
  api.emit("executing", null);
  made.nodes[1].widgets[0].value = 5;
  await looks(2);
  assert.deepEqual(sent, []);
  assert.deepEqual(heard, [null]);
});

test("after a reload a prompt is steered only by the page that queued it, from the workflow with its id", async () => {
  api.emit("execution_start", { prompt_id: "before" });
  app.rootGraph.id = "w1";
  api.clientId = "this";
  const others = [["this", "w2"], ["other", "w1"], [undefined, "w1"]];
  for (const [client_id, id] of [...others, ["this", "w1"]]) {
    running = [[0, "before", {}, { client_id, extra_pnginfo: { workflow: { id } } }]];
    made.nodes[1].widgets[0].value += 1;
    await looks();
  }
  assert.equal(sent.length, 1);
  api.clientId = undefined;
  made.nodes[1].widgets[0].value += 1;
  running[0][3].client_id = undefined;
  await looks();
  assert.equal(sent.length, 1);
});
