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
    const query = String(queryOf(place) ?? "");
    if (asked.get(node) === query) continue;
    asked.set(node, query);
    readOut(node, query);
  }
}

async function readOut(node, query) {
  if (!query) return showCost(node);
  if (!answers.has(query)) answers.set(query, ask(query));
  const answer = await answers.get(query);
  if (asked.get(node) !== query) return; // something has changed meanwhile
  if (answer.error) return showCost(node, { label: answer.error });
  limitSliders(node, answer);
  const values = { ...inUnit(answer), percent: Math.round(answer.flops_ratio * 100) };
  showCost(node, { label: text("cost.line", values), title: answer.text, share: answer.flops_ratio });
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

function inUnit({ touched, dense }) {
  const [size, unit] = dense.touched >= 1e9 ? [1e9, "B"] : [1e6, "M"];
  return { active: (touched / size).toPrecision(3), dense: (dense.touched / size).toPrecision(3), unit };
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

/** What to ask the server about a place; null if its MODEL comes from nothing that we know. */
function queryOf(place) {
  const settings = {};
  const query = new URLSearchParams();
  for (const at of modelChain(place)) {
    const kind = at.node.comfyClass;
    const file = kind in FILES ? valueOf(at, FILES[kind]) : undefined;
    if (file) query.set("model_name", file);
    else if (kind === MADE_HERE) query.set("node", executionId(at));
    if (query.size) break;
    for (const [name, value] of Object.entries(settingsOf(at))) settings[name] ??= value; // the last in the chain counts
  }
  if (!query.size) return null;
  for (const [name, value] of Object.entries({ ...settings, ...imageSize() })) {
    if (value !== undefined) query.set(name, value);
  }
  return query;
}

function settingsOf(place) {
  const value = (name) => valueOf(place, name);
  switch (place.node.comfyClass) {
    case "D2MTopK":
      return { top_k: value("top_k"), capacity: value("capacity") };
    case "D2MActiveBlocks":
      return { active_blocks: String(value("per_group") ?? "").trim() || value("active_blocks") };
    default:
      return {};
  }
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
