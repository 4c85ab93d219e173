import assert from "node:assert/strict";
import { test } from "node:test";

import { asData } from "../../web/expert_map/export.mjs";
import { pathOf } from "../../web/expert_map/path.mjs";
import { MapState, VIEW } from "../../web/expert_map/state.mjs";
import { FreedTrace, Trace } from "../../web/expert_map/trace.mjs";
import { arrived } from "./server.mjs";
import { buffer, description } from "./small_trace.mjs";

/** A store that holds these traces; `wait(step)` may delay a step. Lists the steps that were asked for. */
class Store {
  constructor(...descriptions) {
    this.traces = new Map(descriptions.map((it) => [it.id, new Trace(it)]));
    this.kept = new Map();
    this.asked = [];
    this.forgotten = [];
    this.wait = () => null;
  }

  async trace(id) {
    if (!this.traces.has(id)) throw new FreedTrace(id);
    return this.traces.get(id);
  }

  keptStep(trace, step) {
    return this.kept.get(`${trace.id}/${step}`) ?? null;
  }

  async step(trace, step) {
    this.asked.push(`${trace.id}/${step}`);
    await this.wait(step);
    const decoded = trace.decode(buffer(step), step, 0);
    this.kept.set(`${trace.id}/${step}`, decoded);
    return decoded;
  }

  forget(id) {
    this.forgotten.push(id);
  }
}

/** A state with traces opened: ids "one" and, for two, "two". */
async function opened({ view = {}, traces = ["one"], images, batches, store } = {}) {
  store ??= new Store(...traces.map((id) => description(id)));
  let changes = 0;
  const state = new MapState(store, () => changes++);
  await state.open({ traces, images, batches, view });
  return { state, store, changes: () => changes };
}

test("a new map begins at the last step, in the last block that routes image tokens", async () => {
  const { state } = await opened();
  assert.equal(state.view.step, 1);
  assert.equal(state.view.block, "single_blocks.0");
  assert.equal(state.layer, 2);
  assert.ok(state.ready && !state.busy);
});

test("a saved view of a larger run is brought back to what this one has", async () => {
  const { state } = await opened({
    view: {
      step: 40, sample: 9, block: "single_blocks.37", expert: 20, compare: "difference",
      token: { of: "image", index: 1000 },
    },
  });
  const { step, sample, block, expert, compare, token } = state.view;
  assert.deepEqual({ step, sample, block, expert, compare, token }, {
    step: 1, sample: 0, block: "single_blocks.0", expert: null, compare: "a", token: null,
  });
});

test("what a saved view names and the run has is kept", async () => {
  const view = { ...VIEW, step: 0, block: "double_blocks.0", stream: "text", expert: 3, token: { of: "text", index: 2 } };
  const { state } = await opened({ view });
  assert.deepEqual(state.view, view);
  assert.equal(state.layer, 1);
});

test("a block without image tokens shows its text", async () => {
  const [, text] = description().layers;
  const steps = description().steps.map((step) => ({
    ...step, samples: step.samples.map(({ ran, load }) => ({ ran: [ran[1]], load: [load[1]], blocks: [] })),
  }));
  const { state } = await opened({ store: new (class extends Store {
    async step() { return [null]; }
  })(description("one", { layers: [text], steps })) });
  assert.equal(state.view.stream, "text");
});

test("a freed trace, an empty one and an error are told apart", async () => {
  const freed = await opened({ traces: ["gone"], store: new Store() });
  assert.deepEqual(freed.state.problem, { freed: true });
  assert.deepEqual(freed.store.forgotten, ["gone"]);
  const empty = await opened({ store: new Store(description("one", { steps: [] })) });
  assert.deepEqual(empty.state.problem, { empty: true });
  const store = new Store(description("one"));
  store.trace = async () => { throw new Error("500 out of memory"); };
  assert.deepEqual((await opened({ store })).state.problem, { message: "500 out of memory" });
});

test("a change is shown when its step has come, and the step after it is fetched ahead", async () => {
  const { state, store, changes } = await opened({ view: { step: 1 } });
  assert.deepEqual(store.asked, ["one/1"]);
  const before = changes();
  state.set({ step: 0 });
  await arrived();
  assert.ok(changes() > before);
  assert.equal(state.decoded[0][2].experts.length, 14);
  assert.deepEqual(store.asked, ["one/1", "one/0", "one/1"]);
});

test("a step that arrives after the user has moved on is not shown", async () => {
  const { state, store } = await opened({ view: { step: 1 } });
  let release;
  store.wait = (step) => (step === 0 ? new Promise((resolve) => { release = resolve; }) : null);
  state.set({ step: 0 });
  assert.ok(state.busy);
  state.set({ step: 1 });
  assert.ok(!state.busy);
  const shown = state.decoded[0];
  release();
  await arrived();
  assert.equal(state.decoded[0], shown);
  assert.equal(shown[2], null); // step 1 passed the single block by
});

test("two runs are compared: B is the second, and steps end where each trace does", async () => {
  const short = description("two", { steps: description().steps.slice(0, 1) });
  const store = new Store(description("one"), short);
  const { state } = await opened({ traces: ["one", "two"], view: { compare: "b" }, store });
  assert.equal(state.main.id, "two");
  assert.equal(state.view.step, 1);
  assert.equal(state.stepOf(0), 1);
  assert.equal(state.mainStep, 0);
});

test("the token under the pointer takes the place of the pinned one", async () => {
  const { state } = await opened({ view: { token: { of: "image", index: 2 } } });
  assert.equal(state.token.index, 2);
  state.setHover({ of: "image", index: 3, trace: 0 });
  assert.equal(state.token.index, 3);
  state.setHover(null);
  assert.equal(state.token.index, 2);
});

test("a pointer that rests on one patch causes no redrawing", async () => {
  const { state, changes } = await opened();
  state.setHover({ of: "image", index: 3, trace: 0 });
  const before = changes();
  state.setHover({ of: "image", index: 3, trace: 0 });
  assert.equal(changes(), before);
});

test("the image of the sample is taken from the batch, or the first, or from an older workflow's list", async () => {
  const samples = [{ index: 0, image: 1 }];
  const store = () => new Store(description("one", { samples }));
  assert.equal((await opened({ batches: [["a.png", "b.png"]], store: store() })).state.imageOf(0), "b.png");
  assert.equal((await opened({ batches: [["a.png"]], store: store() })).state.imageOf(0), "a.png");
  assert.equal((await opened({ images: ["old.png"], store: store() })).state.imageOf(0), "old.png");
  assert.equal((await opened({ store: store() })).state.imageOf(0), null);
});

test("a token's path has an entry for each block, null where it was not routed", async () => {
  const { state } = await opened({ view: { step: 1 } });
  const path = pathOf(state, { of: "text", index: 0 });
  assert.deepEqual(path.map((choice) => choice?.chosen.map(({ expert }) => expert) ?? null), [[0, 1], null]);
});

test("exported data holds the view and the choices of the step shown", async () => {
  const { state } = await opened({ view: { step: 1 } });
  const data = JSON.parse(JSON.stringify(asData(state)));
  assert.equal(data.view.step, 1);
  const { step, sample, layers } = data.traces[0].shown;
  assert.deepEqual([step, sample], [1, 0]);
  assert.deepEqual(layers.map((layer) => layer?.name ?? null), ["double_blocks.0.img_mlp", "double_blocks.0.txt_mlp", null]);
  assert.deepEqual(layers[0].experts, [1, 1, 1, 0, 2, 0, 3, 0]);
  assert.deepEqual(layers[1].margin, [10, 20, 30]);
});
