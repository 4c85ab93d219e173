/**
 * Live values: what a user changes on a control node while a prompt runs is sent to ComfyUI, which applies it from the
 * next evaluation of the model.
 *
 * The values are looked at while a prompt runs, rather than heard of by widget callbacks: a promoted widget does not call
 * the inner one's, undo and primitives call none, and what counts is in any case what the prompt would hold now.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { executionId, places, promptWidgets, roundPromoted, valueOf } from "./graph.mjs";
import { text } from "./text.mjs";

export const CONTROLS = new Set(["D2MTopK", "D2MActiveBlocks", "D2MSchedule", "D2MExpertMask"]);
const STANDING = 600; // ms: see isSettled
const INTERVAL = 100; // ms between two looks; one request at a time, and the next look sends what is newest then

const REMEMBERED = 1000; // prompts
const NO_ID = "00000000-0000-0000-0000-000000000000"; // of a workflow that was cleared, or drawn from an API graph

let run = null; // of the prompt that runs: what begin() makes
const queuedFrom = new Map(); // prompt → the workflow, as the frontend holds it, that this page queued it from
const listeners = new Set();

/** Call `listener(place, values)` when a live value took effect, and with null when the prompt has ended. */
export function onLive(listener) {
  listeners.add(listener);
}

export function watchLiveValues() {
  const { queuePrompt } = api;
  api.queuePrompt = function (...given) {
    const workflow = shown();
    const answer = queuePrompt.apply(this, given); // not awaited: what it throws is none of ours
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
  if (queuedFrom.size > REMEMBERED) queuedFrom.delete(queuedFrom.keys().next().value);
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

/** The workflow on the screen. Its tab may be another's while the graph is the same, and have the same id. */
function shown() {
  return app.extensionManager.workflow?.activeWorkflow ?? null;
}

function begin(prompt) {
  end();
  run = {
    prompt,
    shown: shown(),
    seen: controlValues(),
    sending: false,
    standing: new Map(), // changes that wait: see isSettled
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
function controlValues() {
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
  roundPromoted(app.rootGraph);
  const now = controlValues();
  if (shown() !== current.shown) {
    [current.shown, current.seen] = [shown(), now];
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
    if (await isShown(current)) for (const change of together(changes)) await send(current, change);
  } finally {
    current.sending = false;
  }
}

/**
 * Whether a change may be sent: a number at once; a text when it has stood for a while, so that no half-written rule is
 * sent; what a reload of the graph has changed likewise, for it may turn out to be another workflow's.
 */
function isSettled(current, key, value, reloaded) {
  if (typeof value !== "string" && !reloaded) return true;
  const looks = current.standing.get(key)?.value === value ? current.standing.get(key).looks + 1 : 0;
  current.standing.set(key, { value, looks });
  return looks >= STANDING / INTERVAL;
}

/** Whether the workflow on the screen is the one that runs. After a reload of the page only its id can tell. */
async function isShown(current) {
  if (queuedFrom.has(current.prompt)) return queuedFrom.get(current.prompt) === shown();
  const item = (await running()).find(([, prompt]) => prompt === current.prompt);
  const id = item?.[3]?.extra_pnginfo?.workflow?.id;
  return id !== NO_ID && id === app.rootGraph.id;
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
