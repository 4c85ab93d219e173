/**
 * Live values: a change on a control node while a prompt runs is sent to ComfyUI, which applies it from the next evaluation
 * of the model.
 *
 * The values are read at intervals instead of by widget callbacks, which miss changes: a promoted widget does not call the
 * inner widget's callback, and undo and primitive nodes call none.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { executionId, places, promptWidgets, roundPromoted, valueOf } from "./graph.mjs";
import { text } from "./text.mjs";

export const CONTROLS = new Set(["D2MTopK", "D2MBudget", "D2MActiveBlocks", "D2MSchedule", "D2MExpertMask"]);
const SETTLING_TIME = 600; // ms: see isSettled
const INTERVAL = 100; // ms between two readings; only one request is under way at a time

const MAX_REMEMBERED = 1000; // prompts
const NO_ID = "00000000-0000-0000-0000-000000000000"; // id of a cleared workflow, and of one made from an API graph

let run = null; // state of the running prompt, made by begin()
const queuedFrom = new Map(); // prompt → the frontend's workflow from which this page queued it
const listeners = new Set();
const queueListeners = new Set();

/** Call `listener(place, values)` when live values take effect, and `listener(null)` when the prompt has ended. */
export function onLive(listener) {
  listeners.add(listener);
}

/** Call `listener(prompt)` when this page has queued a prompt. */
export function onQueued(listener) {
  queueListeners.add(listener);
}

/** Send the changes of control nodes during every run from now on. */
export function watchLiveValues() {
  const { queuePrompt } = api;
  api.queuePrompt = function (...given) {
    const workflow = shownWorkflow();
    const answer = queuePrompt.apply(this, given); // not awaited: the caller handles its errors
    Promise.resolve(answer).then((it) => remember(it?.prompt_id, workflow), () => {});
    return answer;
  };
  api.addEventListener("execution_start", ({ detail }) => begin(detail.prompt_id));
  api.addEventListener("executing", ({ detail }) => detail === null && end());
  for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(event, end);
  }
  api.addEventListener("status", ({ detail }) => detail?.exec_info?.queue_remaining === 0 && end());
  resume();
}

function remember(prompt, workflow) {
  queuedFrom.set(prompt, workflow);
  for (const listener of queueListeners) listener(prompt);
  if (queuedFrom.size > MAX_REMEMBERED) queuedFrom.delete(queuedFrom.keys().next().value);
}

/** Follow a prompt that was started before a reload of the page and still runs. */
async function resume() {
  const item = (await running())[0];
  if (item && !run) begin(item[1]);
}

async function running() {
  const response = await api.fetchApi("/queue");
  return response.ok ? (await response.json()).queue_running : [];
}

/** The frontend's object of the workflow on the screen. It tells two tabs apart whose graphs and ids are equal. */
export function shownWorkflow() {
  return app.extensionManager.workflow?.activeWorkflow ?? null;
}

function begin(prompt) {
  end();
  run = {
    prompt,
    workflow: shownWorkflow(),
    seen: controlValues(),
    sending: false,
    settling: new Map(), // changes that wait: see isSettled
    failures: new Set(),
    timer: setInterval(() => sendChanges(run), INTERVAL),
  };
}

function end() {
  if (!run) return;
  clearInterval(run.timer);
  run = null;
  for (const listener of listeners) listener(null);
}

/** The place and the values of every control node, by execution id. */
function controlValues() {
  const controls = new Map();
  for (const place of places(app.rootGraph)) {
    if (!CONTROLS.has(place.node.comfyClass)) continue;
    const entries = promptWidgets(place.node).map(({ name }) => [name, valueOf(place, name)]);
    controls.set(executionId(place), {
      place,
      values: Object.fromEntries(entries.filter(([, value]) => value !== undefined)),
    });
  }
  return controls;
}

async function sendChanges(current) {
  if (current.sending) return;
  roundPromoted(app.rootGraph);
  const now = controlValues();
  if (shownWorkflow() !== current.workflow) {
    [current.workflow, current.seen] = [shownWorkflow(), now];
    return;
  }
  const changes = [];
  for (const [id, { place, values }] of now) {
    const before = current.seen.get(id) ?? { place, values };
    const reloaded = before.place.node !== place.node;
    const differing = Object.entries(values).filter(
      ([name, value]) => name in before.values && before.values[name] !== value,
    );
    const changed = differing.filter(([name, value]) => isSettled(current, `${id} ${name}`, value, reloaded));
    if (changed.length) changes.push({ id, place, values: Object.fromEntries(changed) });
    const known = { ...values, ...before.values, ...Object.fromEntries(changed) };
    current.seen.set(id, { place: changed.length < differing.length ? before.place : place, values: known });
  }
  if (!changes.length) return;
  current.sending = true;
  try {
    if (await isShown(current)) for (const change of equalChanges(changes)) await send(current, change);
  } finally {
    current.sending = false;
  }
}

/**
 * Return whether a change can be sent. A number is sent at once. A text must stay the same for a while, so that no
 * half-written rule is sent. So must changes by a reload of the graph, which may turn out to be another workflow.
 */
function isSettled(current, key, value, reloaded) {
  if (typeof value !== "string" && !reloaded) return true;
  const last = current.settling.get(key);
  const readings = last?.value === value ? last.readings + 1 : 0;
  current.settling.set(key, { value, readings });
  return readings >= SETTLING_TIME / INTERVAL;
}

/** Return whether the running workflow is on the screen. After a reload of the page its client and its id tell. */
async function isShown(current) {
  if (queuedFrom.has(current.prompt)) return queuedFrom.get(current.prompt) === shownWorkflow();
  const item = (await running()).find(([, prompt]) => prompt === current.prompt);
  const id = item?.[3]?.extra_pnginfo?.workflow?.id;
  const own = Boolean(api.clientId) && item?.[3]?.client_id === api.clientId; // a reload keeps the page's client id
  return own && id !== NO_ID && id === app.rootGraph.id;
}

/** Group changes to equal values, such as those of all instances of a subgraph: each group is one request. */
function equalChanges(changes) {
  const groups = new Map();
  for (const change of changes) {
    const key = JSON.stringify(change.values);
    groups.set(key, [...(groups.get(key) ?? []), change]);
  }
  return groups.values();
}

async function send(current, changes) {
  const { values } = changes[0];
  let answer;
  try {
    const response = await api.fetchApi("/d2m/live", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ prompt_id: current.prompt, nodes: changes.map(({ id }) => id), values }),
    });
    answer = await response.json();
    if (!response.ok) throw new Error(answer.error ?? response.statusText);
  } catch (error) {
    showError(current, error.message);
    return;
  }
  if (answer.applied && run === current) {
    for (const { place } of changes) for (const listener of listeners) listener(place, values);
  }
}

/** Show an error, at most once in a run. */
function showError(current, message) {
  if (current.failures.has(message)) return;
  current.failures.add(message);
  app.extensionManager.toast.add({ severity: "error", summary: text("live.failed"), detail: message, life: 8000 });
}
