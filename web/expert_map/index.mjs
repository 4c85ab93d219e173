// The widget of the Expert Map node. It shows the traces of the node's runs, remembers them in node.properties, and frees
// traces that no map shows any more.

import { Panel } from "./panel.mjs";
import { TraceStore } from "./trace.mjs";

const CLASS = "D2MExpertMap";
const PROPERTY = "d2m_map";
const SIZE = [900, 920]; // the charts stand beside the map, and the node fits a laptop's screen
const MIN_HEIGHT = 600;
const WRITE_DELAY = 400; // ms without a change after which the view is written to the workflow
const GRACE = 60_000; // ms after which a deleted node's traces are freed; until then undo finds them again

/** Traces that the maps of this page show; frees each when no map shows it any more. */
class ShownTraces {
  constructor(app, store) {
    Object.assign(this, { app, store });
    this.byNode = new Map(); // node -> ids
    this.successors = new Map(); // ids of a run, joined -> the result that replaced it
  }

  set(node, ids) {
    const before = this.byNode.get(node) ?? [];
    this.byNode.set(node, ids);
    for (const id of before) if (!ids.includes(id)) this.release(id);
  }

  /** Remember that a run replaced old traces. Undo may bring back the old ids, but does not undo the run. */
  replaced(before, shown) {
    const key = before.join();
    if (key && key !== shown.traces.join()) this.successors.set(key, shown);
    this.successors.delete(shown.traces.join());
  }

  newest(shown) {
    let newest = shown;
    for (let next; (next = this.successors.get(newest.traces.join())); ) newest = { ...newest, ...next };
    return newest;
  }

  remove(node) {
    const ids = this.byNode.get(node) ?? [];
    this.byNode.delete(node);
    if (ids.length) setTimeout(() => ids.forEach((id) => this.release(id)), GRACE);
  }

  release(id) {
    for (const ids of this.byNode.values()) if (ids.includes(id)) return;
    if (!this.inOpenWorkflow(id)) this.store.free(id);
  }

  /** Return whether the workflow of another tab shows the trace. Leaving a tab removes its nodes only for a while. */
  inOpenWorkflow(id) {
    const workflows = this.app.extensionManager?.workflow;
    return (workflows?.openWorkflows ?? []).some((workflow) =>
      workflow !== workflows.activeWorkflow && JSON.stringify(workflow.activeState ?? null).includes(id));
  }
}

/** Sees to the maps of all D2MExpertMap nodes. Call once, before nodes are made. */
export function setup(app, api) {
  const store = new TraceStore(api);
  const shown = new ShownTraces(app, store);
  app.registerExtension({
    name: "dense2moe.expert_map",
    nodeCreated(node) {
      if (node.comfyClass === CLASS) addMap(node, { app, api, store, shown });
    },
  });
}

function addMap(node, { app, api, store, shown }) {
  let timer = null;
  const write = (changes) => {
    node.properties[PROPERTY] = { ...node.properties[PROPERTY], ...changes };
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker); // so that the view survives a reload
  };
  const panel = new Panel({
    app, api, node, store,
    onview: (view) => {
      if (JSON.stringify(node.properties[PROPERTY]?.view) === JSON.stringify(view)) return;
      clearTimeout(timer);
      timer = setTimeout(() => node.graph && write({ view }), WRITE_DELAY);
    },
  });
  const widget = node.addDOMWidget("expert_map", "D2M_EXPERT_MAP", panel.element, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => MIN_HEIGHT,
  });
  widget.serialize = false; // not in the workflow
  node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);

  chain(node, "onExecuted", (output) => {
    const result = output?.d2m_map?.[0];
    if (!result) return;
    const { traces, images, batches } = result;
    const before = node.properties[PROPERTY]?.traces ?? [];
    shown.replaced(before, { traces, images, batches });
    for (const id of traces) if (panel.state.problem) store.forget(id);
    write({ traces, images, batches });
    shown.set(node, traces);
    panel.open({ ...node.properties[PROPERTY], view: panel.state.ids.length ? panel.state.view : node.properties[PROPERTY].view });
  });
  chain(node, "onConfigure", () => {
    const saved = node.properties[PROPERTY];
    if (!Array.isArray(saved?.traces)) return;
    const newest = shown.newest(saved);
    if (newest !== saved) node.properties[PROPERTY] = newest;
    shown.set(node, newest.traces);
    panel.open(newest);
  });
  chain(node, "onRemoved", () => {
    clearTimeout(timer);
    shown.remove(node);
    panel.remove();
  });
}

/** Call `after` after a method of the node, with the same arguments. */
function chain(node, name, after) {
  const before = node[name];
  node[name] = function (...args) {
    const result = before?.apply(this, args);
    after.apply(this, args);
    return result;
  };
}
