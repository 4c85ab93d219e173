/** Measured seconds a step: the median time between two steps of a sampler in the last run of the workflow on the screen. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { executionId, modelChain, places } from "./graph.mjs";
import { onQueued, shownWorkflow } from "./live.mjs";

const MAX_QUEUED = 100; // prompts whose settings are remembered until they have run

const present = new Map(); // node's execution id → its settings
const queued = new Map(); // prompt → { workflow, settings: those present when it was queued }
let times = new Map(); // sampler's execution id → times of its steps in the present run, in ms
let last = null; // { workflow, settings, seconds: sampler's execution id → seconds a step } of the last run

/** Take the times of the steps of every run from now on. */
export function followSteps() {
  onQueued((prompt) => {
    queued.set(prompt, { workflow: shownWorkflow(), settings: new Map(present) });
    if (queued.size > MAX_QUEUED) queued.delete(queued.keys().next().value);
  });
  api.addEventListener("execution_start", () => (times = new Map()));
  api.addEventListener("progress", ({ detail }) => {
    times.set(detail.node, [...(times.get(detail.node) ?? []), performance.now()]);
  });
  api.addEventListener("execution_success", ({ detail }) => {
    const seconds = new Map([...times].filter(([, it]) => it.length > 1).map(([node, it]) => [node, median(it) / 1000]));
    const run = queued.get(detail?.prompt_id);
    if (run && seconds.size) last = { ...run, seconds }; // nothing is sampled if ComfyUI has all results in its cache
  });
}

/** The median of the differences of ascending numbers. */
function median(ascending) {
  const differences = ascending.slice(1).map((value, index) => value - ascending[index]);
  return differences.sort((one, other) => one - other)[differences.length >> 1];
}

/** Seconds a step of the one sampler that used the MODEL at a place under these settings; null if that was not measured. */
export function secondsOfStep(place, settings) {
  const id = executionId(place);
  present.set(id, settings);
  if (!last || last.workflow !== shownWorkflow() || last.settings.get(id) !== settings) return null;
  const found = [...places(app.rootGraph)].filter(
    (sampler) => last.seconds.has(executionId(sampler)) && [...modelChain(sampler)].some((it) => executionId(it) === id),
  );
  return found.length === 1 ? last.seconds.get(executionId(found[0])) : null;
}
