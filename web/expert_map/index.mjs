// The Expert map node's widget: made with the node, fed by its runs, kept in node.properties, freed when no longer shown.

import { Panel } from "./panel.mjs";
import { TraceStore } from "./trace.mjs";

const CLASS = "D2MExpertMap";
const PROPERTY = "d2m_map";
const SIZE = [680, 1180];
const LEAST_HEIGHT = 660;
const AFTER = 400; // ms without a change until a view is written to the workflow
const GRACE = 60_000; // ms in which an undone deletion finds its trace again

/** Which traces are shown by the maps of this page, and when to free one. */
class Shown {
  constructor(app, store) {
    Object.assign(this, { app, store });
    this.byNode = new Map(); // node -> ids
    this.successors = new Map(); // ids of a run, joined -> what the next run gave in its place
  }

  set(node, ids) {
    const before = this.byNode.get(node) ?? [];
    this.byNode.set(node, ids);
    for (const id of before) if (!ids.includes(id)) this.release(id);
  }

  /** A run gave new traces in the place of old ones. Undo may bring the old ids back; the run is not undone. */
  replaced(before, shown) {
    const key = before.join();
    if (key && key !== shown.traces.join()) this.successors.set(key, shown);
    this.successors.delete(shown.traces.join());
  }

  newest(shown) {
    let found = shown;
    for (let next; (next = this.successors.get(found.traces.join())); ) found = { ...found, ...next };
    return found;
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

  /** Leaving a workflow's tab removes its nodes too; the map is there again when the tab is. */
  inOpenWorkflow(id) {
    const workflows = this.app.extensionManager?.workflow;
    return (workflows?.openWorkflows ?? []).some((workflow) =>
      workflow !== workflows.activeWorkflow && JSON.stringify(workflow.activeState ?? null).includes(id));
  }
}

/** Sees to the maps of all D2MExpertMap nodes. Call once, before nodes are made. */
export function setup(app, api) {
  const store = new TraceStore(api);
  const shown = new Shown(app, store);
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
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker); // so that a reload finds it
  };
  const panel = new Panel({
    app, api, node, store,
    onview: (view) => {
      if (JSON.stringify(node.properties[PROPERTY]?.view) === JSON.stringify(view)) return;
      clearTimeout(timer);
      timer = setTimeout(() => node.graph && write({ view }), AFTER);
    },
  });
  const widget = node.addDOMWidget("expert_map", "D2M_EXPERT_MAP", panel.element, {
    serialize: false, // in the prompt
    hideOnZoom: false,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => LEAST_HEIGHT,
  });
  widget.serialize = false; // in the workflow
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
    const found = shown.newest(saved);
    if (found !== saved) node.properties[PROPERTY] = found;
    shown.set(node, found.traces);
    panel.open(found);
  });
  chain(node, "onRemoved", () => {
    clearTimeout(timer);
    shown.remove(node);
    panel.remove();
  });
}

function chain(node, name, after) {
  const before = node[name];
  node[name] = function (...args) {
    const result = before?.apply(this, args);
    after.apply(this, args);
    return result;
  };
}
