import assert from "node:assert/strict";
import { test } from "node:test";

import { FreedTrace, Trace, TraceStore, differing } from "../../web/expert_map/trace.mjs";
import { bytes, json } from "./server.mjs";
import { buffer, description, stepBytes } from "./small_trace.mjs";

const trace = new Trace(description());

test("layers are gathered into blocks, in the order they run", () => {
  assert.deepEqual(trace.blocks, [
    { name: "double_blocks.0", kind: "double_blocks", number: 0, image: 0, text: 1 },
    { name: "single_blocks.0", kind: "single_blocks", number: 0, image: 2, text: 2 },
  ]);
});

test("a step's bytes are cut into layers: experts, gates, margins", () => {
  const [image, text, joint] = trace.decode(buffer(0), 0, 0);
  assert.deepEqual([...image.experts], [0, 1, 1, 0, 2, 0, 3, 0]);
  assert.deepEqual([...image.gates], [204, 51, 204, 51, 204, 51, 204, 51]);
  assert.deepEqual([...image.margin], [10, 20, 30, 40]);
  assert.deepEqual([...text.margin], [10, 20, 30]);
  assert.equal(joint.experts.length, 2 * 7);
});

test("a layer that did not run has no bytes", () => {
  assert.equal(trace.decode(buffer(1), 1, 0)[2], null);
  assert.equal(trace.top(trace.decode(buffer(1), 1, 0), 2), null);
  assert.equal(trace.shares(1, 0, 2), null);
});

test("bytes of another length are refused with both numbers", () => {
  const length = stepBytes(1).length;
  assert.throws(() => trace.decode(buffer(1).slice(1), 1, 0), new RegExp(`Step 1 of sample 0 has ${length - 1} bytes`));
  const longer = new Uint8Array(length + 1).buffer;
  assert.throws(() => trace.decode(longer, 1, 0), new RegExp(`has ${length + 1} bytes; its layers need ${length}`));
});

test("a trace of another version is refused", () => {
  assert.throws(() => new Trace(description("one", { version: 2 })), /version 2; this map reads version 1/);
  assert.throws(() => new Trace(undefined), /version undefined/);
});

test("the best experts of image and text are found in a layer that routes both", () => {
  const decoded = trace.decode(buffer(0), 0, 0);
  assert.deepEqual([...trace.top(decoded, 2, "image").experts], [0, 1, 0, 1]);
  assert.deepEqual([...trace.top(decoded, 2, "text").experts], [3, 3, 3]);
  assert.deepEqual([...trace.top(decoded, 2, "image").margin], [40, 50, 60, 70]);
});

test("a token's choices are its experts with gates from 0 to 1, best first", () => {
  const decoded = trace.decode(buffer(0), 0, 0);
  const { chosen, margin } = trace.choices(decoded, 0, "image", 1);
  assert.deepEqual(chosen, [{ expert: 1, gate: 0.8 }, { expert: 0, gate: 0.2 }]);
  assert.equal(margin, 20 / 255);
  assert.deepEqual(trace.choices(decoded, 1, "text", 2).chosen, []);
});

test("reference tokens come after the image's and are counted with its layers", () => {
  const reference = new Trace(description("one", { reference_tokens: 5 }));
  assert.equal(reference.tokens(0), 4 + 5);
  assert.equal(reference.tokens(1), 3);
  assert.equal(reference.tokens(2), 3 + 4 + 5);
});

test("shares of load sum to one, and the highest is found over steps and layers", () => {
  assert.deepEqual(trace.shares(0, 0, 0), [0.5, 0.25, 0.125, 0.125]);
  assert.equal(trace.highestShare(0), 1); // double_blocks.0.txt_mlp, step 0
});

test("the difference of two traces is the share of tokens with another best expert", () => {
  const [first, second] = [0, 1].map((step) => trace.top(trace.decode(buffer(step), step, 0), 0));
  assert.equal(differing(first, second), 0.25);
  assert.equal(differing(first, first), 0);
  assert.equal(differing(first, null), null);
  assert.equal(differing(first, { experts: new Uint8Array(9) }), null);
});

/** A store whose server has the small trace under every id, and the list of what was requested. */
function store({ limit, answer } = {}) {
  const requests = [];
  const api = {
    async fetchApi(path, options = {}) {
      requests.push(`${options.method ?? "GET"} ${path}`);
      const special = answer?.(path);
      if (special) return special;
      const [, id, step] = /^\/d2m\/traces\/([^/]+)(?:\/steps\/(\d+)\/samples\/0)?$/.exec(path);
      return step === undefined ? json(description(id)) : bytes(stepBytes(Number(step)));
    },
  };
  return { store: new TraceStore(api, limit), requests };
}

test("a trace and its steps are fetched once, also when asked for twice at a time", async () => {
  const { store: traces, requests } = store();
  const [one, again] = await Promise.all([traces.trace("a"), traces.trace("a")]);
  assert.equal(one, again);
  const [step, same] = await Promise.all([traces.step(one, 0, 0), traces.step(one, 0, 0)]);
  assert.equal(step, same);
  assert.equal(await traces.step(one, 0, 0), step);
  assert.equal(traces.keptStep(one, 0, 0), step);
  assert.deepEqual(requests, ["GET /d2m/traces/a", "GET /d2m/traces/a/steps/0/samples/0"]);
});

test("beyond its limit the store drops the step used longest ago", async () => {
  const { store: traces } = store({ limit: stepBytes(0).length + stepBytes(1).length });
  const [a, b] = [await traces.trace("a"), await traces.trace("b")];
  await traces.step(a, 0, 0);
  await traces.step(a, 1, 0);
  traces.keptStep(a, 0, 0); // now step 1 is the older one
  await traces.step(b, 1, 0);
  assert.notEqual(traces.keptStep(a, 0, 0), null);
  assert.equal(traces.keptStep(a, 1, 0), null);
  assert.notEqual(traces.keptStep(b, 1, 0), null);
  assert.equal(traces.bytes, stepBytes(0).length + stepBytes(1).length);
});

test("one step larger than the limit is kept as long as it is the last", async () => {
  const { store: traces } = store({ limit: 1 });
  const a = await traces.trace("a");
  await traces.step(a, 0, 0);
  assert.notEqual(traces.keptStep(a, 0, 0), null);
  await traces.step(a, 1, 0);
  assert.equal(traces.keptStep(a, 0, 0), null);
});

test("a trace that the server has freed is told apart from other errors, and asked for again next time", async () => {
  const answers = [new Response("", { status: 404 }), new Response("out of memory", { status: 500 }), json(description("a"))];
  const { store: traces } = store({ answer: (path) => (path === "/d2m/traces/a" ? answers.shift() : null) });
  await assert.rejects(traces.trace("a"), FreedTrace);
  await assert.rejects(traces.trace("a"), /500 out of memory/);
  assert.equal((await traces.trace("a")).id, "a");
});

test("freeing a trace forgets it here and deletes it on the server", async () => {
  const { store: traces, requests } = store();
  const [a, b] = [await traces.trace("a"), await traces.trace("b")];
  await traces.step(a, 0, 0);
  await traces.step(b, 0, 0);
  await traces.free("a");
  assert.equal(traces.keptStep(a, 0, 0), null);
  assert.notEqual(traces.keptStep(b, 0, 0), null);
  assert.equal(traces.bytes, stepBytes(0).length);
  assert.equal(requests.at(-1), "DELETE /d2m/traces/a");
});

test("muted experts have no share and no patches, and the next best moves up", () => {
  const settings = { top_k: 2, mask: { "double_blocks.0.img_mlp": [1, 0, 1, 1] } };
  const { steps, ...rest } = description();
  const masked = new Trace({ ...rest, steps: [{ ...steps[0], settings }, steps[1]] });
  const decoded = masked.decode(buffer(0), 0, 0);
  assert.deepEqual([...masked.top(decoded, 0).experts], [0, 0, 2, 3]); // expert 1 was best for the second patch
  assert.deepEqual(masked.choices(decoded, 0, "image", 0).chosen.map(({ expert }) => expert), [0]);
  assert.equal(masked.shares(0, 0, 0)[1], 0);
  assert.deepEqual([...masked.muted(0, 0)], [1]);
  assert.deepEqual([...masked.top(masked.decode(buffer(0), 0, 0), 2).experts], [0, 1, 0, 1]); // another layer's are not
});
