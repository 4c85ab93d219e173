// One D2MExpertMap node, as much of it as the widget asks for; window.made is where the test reaches it.

import { app } from "./scripts/app.js";
import { api } from "./scripts/api.js";
import { setup } from "./extensions/pack/expert_map/index.mjs";
import { loadTexts } from "./extensions/pack/text.mjs";

const parameters = new URLSearchParams(location.search);
const box = document.getElementById("node");

function resize(width, height) {
  Object.assign(box.style, { width: `${width}px`, height: `${height}px` });
}

class Node {
  constructor(id, comfyClass) {
    Object.assign(this, { id, comfyClass, properties: {}, size: [300, 200], pos: [0, 0], inputs: [], outputs: [], widgets: [], mode: 0 });
    this.graph = app.rootGraph;
    this.graph.nodes.push(this);
  }

  setSize([width, height]) {
    this.size = [width, height];
  }

  addDOMWidget(name, type, element, options) {
    box.replaceChildren(element);
    const widget = { name, type, element, options };
    this.widgets.push(widget);
    return widget;
  }
}

/** A node of the graph whose first input comes from another's first output. */
function chained(id, comfyClass, from, input, type) {
  const node = new Node(id, comfyClass);
  if (from) {
    node.inputs.push({ name: input, type, link: app.rootGraph.links.push({ origin_id: from.id, origin_slot: 0, target_id: id }) - 1 });
  }
  return node;
}

await loadTexts();
setup(app, api);
const loader = chained(1, "D2MLoadFluxMoE", null);
let model = loader;
if (!parameters.has("no-mask")) {
  model = chained(2, "D2MExpertMask", loader, "model", "MODEL");
  model.widgets.push({ name: "mask", value: "", callback: (value) => window.made.masks.push(value) });
}
const trace = chained(3, "D2MTraceRouting", model, "model", "MODEL");
const map = chained(4, "D2MExpertMap", trace, "trace", "D2M_TRACE");
window.made = { app, map, masks: [], resize, node: (id) => app.rootGraph.getNodeById(id) };
for (const extension of app.extensions) extension.nodeCreated?.(map);
resize(Number(parameters.get("width") ?? 680), Number(parameters.get("height") ?? 980));

// What ComfyUI keeps of a workflow over a reload.
const saved = localStorage.getItem("workflow");
if (saved) {
  map.properties = JSON.parse(saved);
  map.onConfigure?.({});
}
