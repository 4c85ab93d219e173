// The state of a map: its traces, the view that the user chose, and the decoded step.

import { FreedTrace } from "./trace.mjs";

export const VIEW = {
  step: null, // number; null: the last step
  block: null, // name; null: the last block that routes image tokens
  stream: "image", // or "text"
  sample: 0,
  compare: "a", // "a", "b", "side" or "difference"
  expert: null, // the isolated expert
  token: null, // the pinned token: {of: "image" or "text", index}
  overlay: true,
  opacity: 0.75,
  numbers: true,
  tab: "load",
  scope: "layer", // of new rules: "layer", "kind" or "all"
};

export class MapState {
  constructor(store, onchange) {
    this.store = store;
    this.onchange = onchange;
    this.clear();
  }

  clear() {
    this.ids = [];
    this.batches = []; // for each trace, the images of its batch
    this.traces = [];
    this.view = { ...VIEW };
    this.hover = null;
    this.decoded = []; // for each trace, the step that was loaded last
    this.problem = null; // {freed: true}, {empty: true} or {message}
    this.busy = false;
  }

  /** Show the traces with these ids, in a saved view if there is one. Resolves when the first step is loaded. */
  async open({ traces: wanted, images, batches, view }) {
    this.clear();
    this.ids = [...wanted];
    this.batches = batches ?? (images ?? []).map((image) => [image]);
    this.view = { ...VIEW, ...view };
    this.busy = this.ids.length > 0;
    this.onchange();
    const { ids } = this;
    try {
      const traces = await Promise.all(ids.map((id) => this.store.trace(id)));
      if (this.ids !== ids) return; // replaced meanwhile
      this.traces = traces;
      if (traces.length && !(traces[0].steps.length && traces[0].layers.length)) throw new EmptyTrace();
      this.settle();
      await this.load();
    } catch (error) {
      if (this.ids === ids) this.fail(error);
    }
  }

  fail(error) {
    this.busy = false;
    if (error instanceof EmptyTrace) this.problem = { empty: true };
    else this.problem = error instanceof FreedTrace ? { freed: true } : { message: error.message };
    if (error instanceof FreedTrace) for (const id of this.ids) this.store.forget(id);
    this.onchange();
  }

  /** Replace what the view names but the traces lack: the view may be saved from another run. */
  settle() {
    const { view } = this;
    if (this.traces.length < 2) view.compare = "a";
    view.step = within(view.step ?? this.steps - 1, this.steps);
    view.sample = within(view.sample, this.main.samples.length);
    const { blocks } = this.main;
    if (!blocks.some(({ name }) => name === view.block)) {
      view.block = (blocks.findLast(({ image }) => image !== null) ?? blocks.at(-1)).name;
    }
    if (this.block.image === null) view.stream = "text";
    if (this.block.text === null) view.stream = "image";
    const tokens = view.token?.of === "text" ? this.main.meta.text_tokens : this.main.patches;
    if (view.token && !(view.token.index >= 0 && view.token.index < tokens)) view.token = null;
    if (!(view.expert >= 0 && view.expert < this.main.experts)) view.expert = null;
  }

  set(changes) {
    Object.assign(this.view, changes);
    if (!this.ready) return;
    this.settle();
    this.load().catch((error) => this.fail(error));
    this.onchange();
  }

  setHover(hover) {
    if (hover?.index === this.hover?.index && hover?.of === this.hover?.of && hover?.trace === this.hover?.trace) return;
    this.hover = hover;
    this.onchange();
  }

  get ready() {
    return this.traces.length > 0 && !this.problem;
  }

  /** Index of the trace that legend, charts and paths show. */
  get mainIndex() {
    return this.view.compare === "b" ? 1 : 0;
  }

  get main() {
    return this.traces[this.mainIndex];
  }

  get mainDecoded() {
    return this.decoded[this.mainIndex];
  }

  get steps() {
    return Math.max(...this.traces.map((trace) => trace.steps.length));
  }

  get block() {
    return this.main.blocks.find(({ name }) => name === this.view.block) ?? this.main.blocks[0];
  }

  get blockIndex() {
    return this.main.blocks.indexOf(this.block);
  }

  /** Index of the layer that load charts, legend and rules show. */
  get layer() {
    return this.block[this.view.stream] ?? this.block.image ?? this.block.text;
  }

  /** The index, in trace `index`, of the layer that routes the block's image (or text) tokens; null if none does. */
  layerOf(index, of) {
    return this.traces[index].blocks.find(({ name }) => name === this.view.block)?.[of] ?? null;
  }

  stepOf(index, step = this.view.step) {
    return within(step, this.traces[index].steps.length);
  }

  sampleOf(index, sample = this.view.sample) {
    return within(sample, this.traces[index].samples.length);
  }

  get mainStep() {
    return this.stepOf(this.mainIndex);
  }

  get mainSample() {
    return this.sampleOf(this.mainIndex);
  }

  /** The token whose path is shown: the one under pointer or keyboard, else the pinned one. */
  get token() {
    return this.hover ?? this.view.token;
  }

  /** The image of a trace's shown sample as {filename, subfolder, type}; null if there is none. */
  imageOf(index) {
    const batch = this.batches[index] ?? [];
    const sample = this.traces[index].samples[this.sampleOf(index)];
    return batch[sample.image ?? sample.index] ?? batch[0] ?? null;
  }

  /** Fetch the step in view if need be, then the step after it. A step that arrives too late is only cached. */
  async load() {
    const { step, sample } = this.view;
    const { traces } = this;
    const get = (at, way) =>
      traces.map((trace, index) => this.store[way](trace, this.stepOf(index, at), this.sampleOf(index, sample)));
    let decoded = get(step, "keptStep");
    const cached = decoded.every((layers) => layers);
    if (!cached) {
      this.busy = true;
      decoded = await Promise.all(get(step, "step"));
      if (this.traces !== traces || this.view.step !== step || this.view.sample !== sample) return;
    }
    this.decoded = decoded;
    this.busy = false;
    if (!cached) this.onchange();
    if (step + 1 < this.steps) Promise.all(get(step + 1, "step")).catch(() => {}); // reported when the user goes there
  }
}

class EmptyTrace extends Error {}

function within(value, length) {
  return Math.min(Math.max(Math.round(Number(value)) || 0, 0), length - 1);
}
