/**
 * The cost readout: activated parameters and FLOPs of one evaluation of the model, compared with the dense model, under the
 * present settings of a node and of the nodes before it.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { executionId, modelChain, places, roundPromoted, valueOf } from "./graph.mjs";
import { followSteps, secondsOfStep } from "./pace.mjs";
import { hasReadout, showCost } from "./readout.mjs";
import { text } from "./text.mjs";
import { fitWidgets } from "./widgets.mjs";

const LOADER = "D2MLoadFluxMoE";
const FILES = { D2MLoadFluxMoE: "model_name", UNETLoader: "unet_name" }; // loader → the widget that names its file
const CONVERTER = "D2MConvertFlux";
const MAX_VALUES = 16; // number of a schedule's values for which costs are requested
const INTERVAL = 300; // ms between two inspections of the graph

let requested = new WeakMap(); // node → the queries of its readout, joined
const answers = new Map(); // query → promise of the server's answer

/** Inspect the graph at intervals: no single event covers changes of links, modes, widgets and subgraphs. */
export function watchCosts() {
  setInterval(() => document.hidden || refresh(), INTERVAL);
  followSteps();
  // The model that a node makes is known only after its run.
  api.addEventListener("execution_success", () => {
    for (const query of answers.keys()) if (query.startsWith("node=")) answers.delete(query);
    requested = new WeakMap();
  });
}

function refresh() {
  roundPromoted(app.rootGraph);
  const done = new Set();
  for (const place of places(app.rootGraph)) {
    const { node } = place;
    if (!hasReadout(node) || done.has(node)) continue; // the first instance of a subgraph represents all
    done.add(node);
    const queries = queriesOf(place);
    const seconds = queries.length ? secondsOfStep(place, queries.join(" ")) : null;
    const key = [...queries, seconds].join(" ");
    if (requested.get(node) === key) continue;
    requested.set(node, key);
    updateReadout(node, queries, seconds, key);
  }
}

async function updateReadout(node, queries, seconds, key) {
  if (!queries.length) return showCost(node);
  for (const query of queries) if (!answers.has(query)) answers.set(query, fetchCost(query));
  const costs = await Promise.all(queries.map((query) => answers.get(query)));
  if (requested.get(node) !== key) return; // something has changed meanwhile
  const failed = costs.find(({ error }) => error);
  if (failed) return showCost(node, { label: failed.label ?? failed.error, title: failed.error });
  fitWidgets(node, costs[0]);
  costs.sort((one, other) => one.flops - other.flops);
  const { dense, flops_ratio: share, is_dense: isDense, width, height } = costs.at(-1);
  const title = costs.map((it) => it.text).join("\n");
  if (isDense && node.comfyClass === LOADER) return showCost(node, { label: text("cost.dense"), title });
  const [size, unit] = dense.touched >= 1e9 ? [1e9, "B"] : [1e6, "M"];
  const values = {
    active: span(costs.map(({ touched }) => (touched / size).toPrecision(3))),
    dense: (dense.touched / size).toPrecision(3),
    unit,
    percent: span(costs.map(({ flops_ratio }) => Math.round(flops_ratio * 100))),
    size: width === height ? `${width}²` : `${width} × ${height}`,
  };
  const pace = seconds === null ? "" : ` · ${text("cost.pace", { seconds: seconds.toPrecision(2) })}`;
  showCost(node, { label: text("cost.line", values) + pace, title, share });
}

/** The first and the last of ascending values, as a range. */
function span(values) {
  return values[0] === values.at(-1) ? values[0] : `${values[0]}–${values.at(-1)}`;
}

async function fetchCost(query) {
  try {
    const response = await api.fetchApi(`/d2m/cost?${query}`);
    const answer = await response.json();
    if (response.ok) return answer;
    const label = response.status === 404 ? text(query.startsWith("node=") ? "cost.not_run" : "cost.no_file") : undefined;
    return { error: answer.error ?? response.statusText, label };
  } catch (error) {
    answers.delete(query); // the server did not answer: ask again after the next change
    return { error: error.message };
  }
}

/**
 * The queries for the cost of the MODEL at a place: one, or under a schedule one for each of its values. None if the MODEL
 * comes from a node that this pack does not know.
 */
function queriesOf(place) {
  const settings = {};
  const query = new URLSearchParams();
  for (const at of modelChain(place)) {
    const kind = at.node.comfyClass;
    const file = kind in FILES ? valueOf(at, FILES[kind]) : undefined;
    if (file) query.set("model_name", file);
    else if (kind === CONVERTER) {
      query.set("node", executionId(at));
      if (app.rootGraph.id) query.set("workflow", app.rootGraph.id);
    }
    if (query.size) break;
    for (const [name, values] of Object.entries(settingsOf(at))) {
      // The setting that is last in the chain counts, and a budget replaces those before it.
      if (!settings.budget && (name !== "budget" || !(settings.top_k || settings.capacity))) settings[name] ??= values;
    }
  }
  if (!query.size) return [];
  for (const [name, value] of Object.entries(imageSize())) query.set(name, value);
  let queries = [query];
  for (const [name, values] of Object.entries(settings)) {
    queries = queries.flatMap((it) => values.map((value) => new URLSearchParams([...it, [name, value]])));
  }
  return queries.map(String);
}

/** The settings of a control node: name → the values that it can have in a run. */
function settingsOf(place) {
  const value = (name) => valueOf(place, name);
  const known = (values) => Object.fromEntries(Object.entries(values).filter(([, [it]]) => it !== undefined));
  switch (place.node.comfyClass) {
    case "D2MTopK":
      return known({ top_k: [value("top_k")], capacity: [value("capacity")] });
    case "D2MBudget":
      return known({ budget: [value("budget")] });
    case "D2MActiveBlocks":
      return known({ active_blocks: [String(value("per_group") ?? "").trim() || value("active_blocks")] });
    case "D2MSchedule":
      return known({ [value("setting")]: scheduled(value("pieces") ?? "") });
    default:
      return {};
  }
}

/** The distinct values in a schedule's text, which has lines "START - END: VALUE". */
function scheduled(pieces) {
  const values = pieces.split("\n").map((line) => line.replace(/#.*/, "").split(":")[1]?.trim());
  return [...new Set(values.filter(Boolean))].slice(0, MAX_VALUES);
}

/** The image size of the first empty latent in the graph; without one the server uses its default. */
function imageSize() {
  for (const place of places(app.rootGraph)) {
    if (!/^Empty\w*Latent/.test(place.node.comfyClass ?? "")) continue;
    const [width, height] = [valueOf(place, "width"), valueOf(place, "height")];
    if (width && height) return { width, height };
  }
  return {};
}
