// What a map shows: traces, the view of them that the user chose, and the step that is decoded.

import { FreedTrace } from "./trace.mjs";

export const VIEW = {
  step: null, // number; null: the last
  block: null, // name; null: the last one that routes image tokens
  stream: "image", // or "text"
  sample: 0,
  compare: "a", // "a", "b", "side" or "difference"
  expert: null, // the one that is isolated
  token: null, // the pinned one: {of: "image" or "text", index}
  overlay: true,
  opacity: 0.75,
  numbers: true,
  tab: "load",
  scope: "layer", // of mute and its like: "layer", "kind" or "all"
};

export class MapState {
  constructor(store, onchange) {
    this.store = store;
    this.onchange = onchange;
    this.clear();
  }

  clear() {
    this.ids = [];
    this.batches = []; // of each trace, the images of its batch
    this.traces = [];
    this.view = { ...VIEW };
    this.hover = null;
    this.decoded = []; // of each trace, the step that was loaded last
    this.problem = null; // {freed: true} or {message}
    this.busy = false;
  }

  /** Shows the traces with these ids; `view` is what was saved of an earlier one. Returns when the first step is there. */
  async open({ traces, images, batches, view }) {
    this.clear();
    this.ids = [...traces];
    this.batches = batches ?? (images ?? []).map((image) => [image]);
    this.view = { ...VIEW, ...view };
    this.busy = this.ids.length > 0;
    this.onchange();
    const { ids } = this;
    try {
      const found = await Promise.all(ids.map((id) => this.store.trace(id)));
      if (this.ids !== ids) return; // replaced meanwhile
      this.traces = found;
      if (found.length && !(found[0].steps.length && found[0].layers.length)) throw new EmptyTrace();
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

  /** A saved view may be of another run: everything it names is brought back to what there is. */
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

  /** Number of the trace that legend, charts and paths are about. */
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

  /** Index of the layer that load charts, legend and rules are about; null if the block routes no such tokens. */
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

  /** The token whose path is shown: under the pointer or cursor, else the pinned one. */
  get token() {
    return this.hover ?? this.view.token;
  }

  /** The image of the sample shown of a trace, as ComfyUI names its files; null if there is none. */
  imageOf(index) {
    const batch = this.batches[index] ?? [];
    const sample = this.traces[index].samples[this.sampleOf(index)];
    return batch[sample.image ?? sample.index] ?? batch[0] ?? null;
  }

  /** Fetches the step in view, unless it is here; what comes too late is only kept. Then the one after it. */
  async load() {
    const { step, sample } = this.view;
    const { traces } = this;
    const get = (at, way) =>
      traces.map((trace, index) => this.store[way](trace, this.stepOf(index, at), this.sampleOf(index, sample)));
    let decoded = get(step, "keptStep");
    const here = decoded.every((layers) => layers);
    if (!here) {
      this.busy = true;
      decoded = await Promise.all(get(step, "step"));
      if (this.traces !== traces || this.view.step !== step || this.view.sample !== sample) return;
    }
    this.decoded = decoded;
    this.busy = false;
    if (!here) this.onchange();
    if (step + 1 < this.steps) Promise.all(get(step + 1, "step")).catch(() => {}); // said when it is asked for
  }
}

class EmptyTrace extends Error {}

function within(value, length) {
  return Math.min(Math.max(Math.round(Number(value)) || 0, 0), length - 1);
}
