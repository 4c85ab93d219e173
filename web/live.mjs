/**
 * Live values: what a user changes on a control node while a prompt runs is sent to ComfyUI, which applies it from the
 * next evaluation of the model.
 *
 * The values are looked at while a prompt runs, rather than heard of by widget callbacks: a promoted widget does not call
 * the inner one's, undo and primitives call none, and what counts is in any case what the prompt would hold now.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { executionId, places, promptWidgets, valueOf } from "./graph.mjs";
import { text } from "./text.mjs";

export const CONTROLS = new Set(["D2MTopK", "D2MActiveBlocks", "D2MSchedule", "D2MExpertMask"]);
const TYPING = 600; // ms that a text must stand
const INTERVAL = 100; // ms between two looks; one request at a time, and the next look sends what is newest then

let run = null; // of the prompt that runs: what begin() makes
const listeners = new Set();

/** Call `listener(place, values)` when a live value took effect, and with null when the prompt has ended. */
export function onLive(listener) {
  listeners.add(listener);
}

export function watchLiveValues() {
  api.addEventListener("execution_start", ({ detail }) => begin(detail.prompt_id));
  api.addEventListener("executing", ({ detail }) => detail === null && end());
  for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(event, end);
  }
  api.addEventListener("status", ({ detail }) => detail?.exec_info?.queue_remaining === 0 && end());
  resume();
}

/** After a reload of the page the prompt that it had begun may still run. */
async function resume() {
  const item = (await running())[0];
  if (item && !run) begin(item[1]);
}

async function running() {
  const response = await api.fetchApi("/queue");
  return response.ok ? (await response.json()).queue_running : [];
}

function begin(prompt) {
  end();
  run = {
    prompt,
    workflow: undefined, // the id of its workflow, asked for when there is something to send
    graph: app.rootGraph.id, // on the screen
    seen: values(),
    sending: false,
    typed: new Map(), // texts that have changed
    failures: new Set(),
    timer: setInterval(() => look(run), INTERVAL),
  };
}

function end() {
  if (!run) return;
  clearInterval(run.timer);
  run = null;
  for (const listener of listeners) listener(null);
}

/** The values of every control of the graph, by execution id: { place, values }. */
function values() {
  const found = new Map();
  for (const place of places(app.rootGraph)) {
    if (!CONTROLS.has(place.node.comfyClass)) continue;
    const entries = promptWidgets(place.node).map(({ name }) => [name, valueOf(place, name)]);
    found.set(executionId(place), {
      place,
      values: Object.fromEntries(entries.filter(([, value]) => value !== undefined)),
    });
  }
  return found;
}

async function look(current) {
  if (current.sending) return;
  const now = values();
  if (app.rootGraph.id !== current.graph) {
    [current.graph, current.seen] = [app.rootGraph.id, now]; // another workflow is shown
    return;
  }
  const changes = [];
  for (const [id, { place, values }] of now) {
    const seen = current.seen.get(id)?.values;
    const changed = Object.entries(values).filter(
      ([name, value]) => seen && name in seen && seen[name] !== value && isSettled(current, `${id} ${name}`, value),
    );
    if (changed.length) changes.push({ id, place, values: Object.fromEntries(changed) });
    current.seen.set(id, { place, values: { ...values, ...seen, ...Object.fromEntries(changed) } });
  }
  if (!changes.length) return;
  current.sending = true;
  try {
    if (await isShown(current)) for (const change of together(changes)) await send(current, change);
  } finally {
    current.sending = false;
  }
}

/** Numbers are always; a text is when it has stood for a while, so that no half-written rule is sent. */
function isSettled(current, key, value) {
  if (typeof value !== "string") return true;
  const looks = current.typed.get(key)?.value === value ? current.typed.get(key).looks + 1 : 0;
  current.typed.set(key, { value, looks });
  return looks >= TYPING / INTERVAL;
}

/** Whether the graph on the screen is the one that runs, as far as its workflow tells. */
async function isShown(current) {
  if (current.workflow === undefined) {
    const item = (await running()).find(([, prompt]) => prompt === current.prompt);
    current.workflow = item?.[3]?.extra_pnginfo?.workflow?.id ?? null;
  }
  return current.workflow === current.graph;
}

/** Changes to the same values, as of all the instances of a subgraph, go in one request. */
function together(changes) {
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
    tell(current, error.message);
    return;
  }
  if (answer.applied && run === current) {
    for (const { place } of changes) for (const listener of listeners) listener(place, values);
  }
}

/** Say an error, the same one once a run. */
function tell(current, message) {
  if (current.failures.has(message)) return;
  current.failures.add(message);
  app.extensionManager.toast.add({ severity: "error", summary: text("live.failed"), detail: message, life: 8000 });
}
