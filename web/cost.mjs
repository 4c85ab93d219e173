/**
 * The cost readout: activated parameters and FLOPs of one evaluation against the dense model, under the settings that a
 * node's widgets, and those of the nodes before it, have now.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { executionId, modelChain, places, roundPromoted, valueOf } from "./graph.mjs";
import { hasReadout, showCost } from "./readout.mjs";
import { text } from "./text.mjs";

const FILES = { D2MLoadFluxMoE: "model_name", UNETLoader: "unet_name" }; // loader → the widget that names its file
const MADE_HERE = "D2MConvertFlux";
const MOST_VALUES = 16; // of a schedule that are asked about
const INTERVAL = 300; // ms between two looks at the graph

let asked = new WeakMap(); // node → the query of its readout
const answers = new Map(); // query → what the server said

/** Look at the graph now and then: links, modes, widgets and subgraphs change without one event for all of them. */
export function watchCosts() {
  setInterval(() => document.hidden || refresh(), INTERVAL);
  // What a node has made is known only when it has run.
  api.addEventListener("execution_success", () => {
    for (const query of answers.keys()) if (query.startsWith("node=")) answers.delete(query);
    asked = new WeakMap();
  });
}

function refresh() {
  roundPromoted(app.rootGraph);
  const done = new Set();
  for (const place of places(app.rootGraph)) {
    const { node } = place;
    if (!hasReadout(node) || done.has(node)) continue; // the first instance of a subgraph speaks for all
    done.add(node);
    const queries = queriesOf(place);
    const key = queries.join(" ");
    if (asked.get(node) === key) continue;
    asked.set(node, key);
    readOut(node, queries, key);
  }
}

async function readOut(node, queries, key) {
  if (!queries.length) return showCost(node);
  for (const query of queries) if (!answers.has(query)) answers.set(query, ask(query));
  const found = await Promise.all(queries.map((query) => answers.get(query)));
  if (asked.get(node) !== key) return; // something has changed meanwhile
  const wrong = found.find(({ error }) => error);
  if (wrong) return showCost(node, { label: wrong.error });
  limitSliders(node, found[0]);
  found.sort((one, other) => one.flops - other.flops);
  const { dense, flops_ratio: share } = found.at(-1);
  const [size, unit] = dense.touched >= 1e9 ? [1e9, "B"] : [1e6, "M"];
  const values = {
    active: span(found.map(({ touched }) => (touched / size).toPrecision(3))),
    dense: (dense.touched / size).toPrecision(3),
    unit,
    percent: span(found.map(({ flops_ratio }) => Math.round(flops_ratio * 100))),
  };
  showCost(node, { label: text("cost.line", values), title: found.map((it) => it.text).join("\n"), share });
}

function span(values) {
  return values[0] === values.at(-1) ? values[0] : `${values[0]}–${values.at(-1)}`;
}

async function ask(query) {
  try {
    const response = await api.fetchApi(`/d2m/cost?${query}`);
    const answer = await response.json();
    return response.ok ? answer : { error: answer.error ?? response.statusText };
  } catch (error) {
    answers.delete(query); // the server was away: ask again when something changes
    return { error: error.message };
  }
}

/** Let sliders end where the file does. */
function limitSliders(node, { experts, groups }) {
  const largest = { top_k: experts, active_blocks: groups?.length ? Math.max(...groups) : undefined };
  for (const widget of node.widgets ?? []) {
    const most = largest[widget.name];
    if (!most || widget.options.max === most) continue;
    widget.options.max = most;
    app.canvas.setDirty(true);
  }
}

/** What to ask the server about a place: nothing if its MODEL comes from nothing that we know, under a schedule each of
 * its values. */
function queriesOf(place) {
  const settings = {};
  const query = new URLSearchParams();
  for (const at of modelChain(place)) {
    const kind = at.node.comfyClass;
    const file = kind in FILES ? valueOf(at, FILES[kind]) : undefined;
    if (file) query.set("model_name", file);
    else if (kind === MADE_HERE) query.set("node", executionId(at));
    if (query.size) break;
    for (const [name, values] of Object.entries(settingsOf(at))) settings[name] ??= values; // the last in the chain counts
  }
  if (!query.size) return [];
  for (const [name, value] of Object.entries(imageSize())) query.set(name, value);
  let queries = [query];
  for (const [name, values] of Object.entries(settings)) {
    queries = queries.flatMap((it) => values.map((value) => new URLSearchParams([...it, [name, value]])));
  }
  return queries.map(String);
}

/** The settings of a control: each with the values that it may have in a run. */
function settingsOf(place) {
  const value = (name) => valueOf(place, name);
  const known = (values) => Object.fromEntries(Object.entries(values).filter(([, [it]]) => it !== undefined));
  switch (place.node.comfyClass) {
    case "D2MTopK":
      return known({ top_k: [value("top_k")], capacity: [value("capacity")] });
    case "D2MActiveBlocks":
      return known({ active_blocks: [String(value("per_group") ?? "").trim() || value("active_blocks")] });
    case "D2MSchedule":
      return known({ [value("setting")]: scheduled(value("pieces") ?? "") });
    default:
      return {};
  }
}

/** The different values of a schedule's pieces, "START - END: VALUE" on a line each. */
function scheduled(pieces) {
  const values = pieces.split("\n").map((line) => line.replace(/#.*/, "").split(":")[1]?.trim());
  return [...new Set(values.filter(Boolean))].slice(0, MOST_VALUES);
}

/** The size of the first empty latent in the graph; without one the server takes its own. */
function imageSize() {
  for (const place of places(app.rootGraph)) {
    if (!/^Empty\w*Latent/.test(place.node.comfyClass ?? "")) continue;
    const [width, height] = [valueOf(place, "width"), valueOf(place, "height")];
    if (width && height) return { width, height };
  }
  return {};
}
