// Traces as the server sends them: JSON that describes the run, and bytes for each step of each sample.
// Shapes: T tokens, K slots (experts of a token, best first), E experts.

export const NONE = 255; // an empty slot
const VERSION = 1;

/** Thrown for a trace that the server no longer has. */
export class FreedTrace extends Error {}

/** The blocks of a trace in the order they run, each with the index of the layer that routes its image and its text. */
function blocksOf(layers) {
  const blocks = new Map();
  layers.forEach((layer, index) => {
    const [kind, number] = layer.name.split(".");
    const name = `${kind}.${number}`;
    if (!blocks.has(name)) blocks.set(name, { name, kind, number: Number(number), image: null, text: null });
    const block = blocks.get(name);
    if (layer.stream !== "txt") block.image = index;
    if (layer.stream !== "img") block.text = index;
  });
  return [...blocks.values()];
}

export class Trace {
  constructor(meta) {
    if (meta?.version !== VERSION) {
      throw new Error(`The trace has version ${meta?.version}; this map reads version ${VERSION}. Update ComfyUI-Dense2MoE and reload the page.`);
    }
    this.meta = meta;
    this.id = meta.id;
    this.grid = meta.grid;
    this.layers = meta.layers;
    this.groups = meta.groups ?? [];
    this.steps = meta.steps;
    this.samples = meta.samples;
    this.slots = meta.slots;
    this.patches = meta.grid.height * meta.grid.width;
    this.experts = Math.max(1, ...meta.layers.map((layer) => layer.experts));
    this.blocks = blocksOf(meta.layers);
    this.imageTokens = this.patches + (meta.reference_tokens ?? 0);
    this.layerByName = new Map(meta.layers.map((layer, index) => [layer.name, index]));
    this.highest = new Map(); // highest share of one expert, by sample
  }

  tokens(layer) {
    const { stream } = this.layers[layer];
    if (stream === "img") return this.imageTokens;
    return stream === "txt" ? this.meta.text_tokens : this.meta.text_tokens + this.imageTokens;
  }

  /** Index of the first image (or text) token among the tokens of the layer. */
  first(layer, of) {
    return this.layers[layer].stream === "joint" && of === "image" ? this.meta.text_tokens : 0;
  }

  record(step, sample) {
    return this.steps[step].samples[sample];
  }

  ran(step, sample, layer) {
    return this.record(step, sample).ran[layer];
  }

  /** The experts of a layer that an Expert Mask muted at a step: their output did not count, though tokens chose them. */
  muted(step, layer) {
    const weights = this.steps[step].settings?.mask?.[this.layers[layer].name] ?? [];
    return new Set(weights.flatMap((weight, expert) => (weight === 0 ? [expert] : [])));
  }

  /** Share of the layer's choices that went to each expert, without muted ones, or null if it did not run. */
  shares(step, sample, layer) {
    if (!this.ran(step, sample, layer)) return null;
    const muted = this.muted(step, layer);
    const load = this.record(step, sample).load[layer].map((count, expert) => (muted.has(expert) ? 0 : count));
    const all = load.reduce((sum, count) => sum + count, 0);
    return load.map((count) => (all ? count / all : 0));
  }

  /** The highest share of any expert over all steps and layers of a sample, which ends the load charts' scale. */
  highestShare(sample) {
    if (!this.highest.has(sample)) {
      let highest = 0;
      for (let step = 0; step < this.steps.length; step++) {
        for (let layer = 0; layer < this.layers.length; layer++) {
          for (const share of this.shares(step, sample, layer) ?? []) highest = Math.max(highest, share);
        }
      }
      this.highest.set(sample, highest || 1);
    }
    return this.highest.get(sample);
  }

  /**
   * Split the bytes of one step of one sample into layers: experts and gates [T*K] and margin [T], or null for a layer that
   * did not run. Muted experts are taken out. Returns views of the buffer, not copies. Throws an Error if the length does not fit the layers.
   */
  decode(buffer, step, sample) {
    const layers = [];
    let at = 0;
    const take = (length) => {
      if (at + length > buffer.byteLength) {
        throw new Error(`Step ${step} of sample ${sample} has ${buffer.byteLength} bytes; its layers need more.`);
      }
      at += length;
      return new Uint8Array(buffer, at - length, length);
    };
    this.layers.forEach((_, layer) => {
      if (!this.ran(step, sample, layer)) return layers.push(null);
      const tokens = this.tokens(layer);
      const choices = tokens * this.slots;
      const data = { experts: take(choices), gates: take(choices), margin: take(tokens) };
      takeOut(data, this.muted(step, layer), this.slots);
      return layers.push(data);
    });
    if (at !== buffer.byteLength) {
      throw new Error(`Step ${step} of sample ${sample} has ${buffer.byteLength} bytes; its layers need ${at}.`);
    }
    return layers;
  }

  /** Best expert and margin of every patch (or text token) of a layer of a decoded step; Uint8Array each. */
  top(decoded, layer, of = "image") {
    const data = decoded[layer];
    if (!data) return null;
    const count = of === "image" ? this.patches : this.meta.text_tokens;
    const first = this.first(layer, of);
    const experts = new Uint8Array(count);
    for (let i = 0; i < count; i++) experts[i] = data.experts[(first + i) * this.slots];
    return { experts, margin: data.margin.subarray(first, first + count) };
  }

  /** The choices of a token in a layer: {chosen: [{expert, gate}…], margin}, best first, numbers from 0 to 1. */
  choices(decoded, layer, of, token) {
    const data = decoded[layer];
    if (!data) return null;
    const at = this.first(layer, of) + token;
    const chosen = [];
    for (let slot = at * this.slots; slot < (at + 1) * this.slots; slot++) {
      if (data.experts[slot] !== NONE) chosen.push({ expert: data.experts[slot], gate: data.gates[slot] / 255 });
    }
    return { chosen, margin: data.margin[at] / 255 };
  }
}

/** Take muted experts out of the tokens' choices: the next best moves up. */
function takeOut({ experts, gates }, muted, slots) {
  if (!muted.size) return;
  for (let first = 0; first < experts.length; first += slots) {
    let kept = first;
    for (let slot = first; slot < first + slots; slot++) {
      if (muted.has(experts[slot])) continue;
      [experts[kept], gates[kept]] = [experts[slot], gates[slot]];
      kept += 1;
    }
    experts.fill(NONE, kept, first + slots);
  }
}

/** The share of patches whose best expert differs, or null if the two maps have different sizes. */
export function differing(one, other) {
  if (!one || !other || one.experts.length !== other.experts.length) return null;
  let count = 0;
  for (let i = 0; i < one.experts.length; i++) if (one.experts[i] !== other.experts[i]) count++;
  return count / one.experts.length;
}

/** Fetches traces and their steps, and caches the steps that were used last, up to `limit` bytes. */
export class TraceStore {
  constructor(api, limit = 192 * 2 ** 20) {
    this.api = api;
    this.limit = limit;
    this.bytes = 0;
    this.traces = new Map(); // id -> Promise<Trace>
    this.kept = new Map(); // "id/step/sample" -> {layers, bytes}; the one that was used last is at the end
    this.pending = new Map();
  }

  async get(path) {
    const response = await this.api.fetchApi(path, { cache: "no-cache" });
    if (response.status === 404) throw new FreedTrace(path);
    if (!response.ok) {
      const text = await response.text();
      throw new Error(`${response.status} ${text.slice(0, 300) || response.statusText}`);
    }
    return response;
  }

  trace(id) {
    if (!this.traces.has(id)) {
      const trace = this.get(`/d2m/traces/${encodeURIComponent(id)}`)
        .then(async (response) => new Trace(await response.json()));
      this.traces.set(id, trace);
      trace.catch(() => this.traces.delete(id)); // fetched again next time
    }
    return this.traces.get(id);
  }

  /** The decoded step if it is cached, else null. */
  keptStep(trace, step, sample) {
    const key = `${trace.id}/${step}/${sample}`;
    const entry = this.kept.get(key);
    if (!entry) return null;
    this.kept.delete(key);
    this.kept.set(key, entry);
    return entry.layers;
  }

  step(trace, step, sample) {
    const cached = this.keptStep(trace, step, sample);
    if (cached) return Promise.resolve(cached);
    const key = `${trace.id}/${step}/${sample}`;
    if (!this.pending.has(key)) {
      const layers = this.get(`/d2m/traces/${encodeURIComponent(trace.id)}/steps/${step}/samples/${sample}`)
        .then(async (response) => {
          const buffer = await response.arrayBuffer();
          const decoded = trace.decode(buffer, step, sample);
          this.keep(key, { layers: decoded, bytes: buffer.byteLength });
          return decoded;
        })
        .finally(() => this.pending.delete(key));
      this.pending.set(key, layers);
    }
    return this.pending.get(key);
  }

  keep(key, entry) {
    this.kept.set(key, entry);
    this.bytes += entry.bytes;
    for (const [old, { bytes }] of this.kept) {
      if (this.bytes <= this.limit || old === key) break;
      this.kept.delete(old);
      this.bytes -= bytes;
    }
  }

  /** Forget a trace, and free it on the server. */
  async free(id) {
    this.forget(id);
    await this.api.fetchApi(`/d2m/traces/${encodeURIComponent(id)}`, { method: "DELETE" }).catch(() => {});
  }

  forget(id) {
    this.traces.delete(id);
    for (const [key, { bytes }] of this.kept) {
      if (key.startsWith(`${id}/`)) {
        this.kept.delete(key);
        this.bytes -= bytes;
      }
    }
  }
}
