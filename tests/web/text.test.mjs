import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { after, test } from "node:test";

import { settingsOf } from "../../web/expert_map/stage.mjs";
import { tokenName } from "../../web/expert_map/path.mjs";
import { withoutPadding } from "../../web/expert_map/tokens.mjs";
import { Trace } from "../../web/expert_map/trace.mjs";
import { loadTexts, text } from "../../web/text.mjs";
import { json } from "./server.mjs";
import { api } from "./comfyui/api.mjs";
import { app } from "./comfyui/app.mjs";
import { description } from "./small_trace.mjs";

const english = JSON.parse(readFileSync(new URL("../../locales/en/main.json", import.meta.url), "utf8"));

async function load(languages, locale) {
  api.fetchApi = async () => json(languages);
  app.extensionManager = { setting: { get: () => locale } };
  await loadTexts();
}

after(() => {
  app.extensionManager = {};
});

test("a text comes in the frontend's language, or else in English, or else as its key", async () => {
  await load({ en: { d2m: { a: { one: "one", two: "two" } } }, zh: { d2m: { a: { one: "一" } } } }, "zh");
  assert.equal(text("a.one"), "一");
  assert.equal(text("a.two"), "two");
  assert.equal(text("a.three"), "a.three");
  assert.equal(text("a.one.more"), "a.one.more");
});

test("values are put into the text; a name without a value stays", async () => {
  await load({ en: { d2m: { cost: "{active} of {dense}, {active}" } } });
  assert.equal(text("cost", { active: 0 }), "0 of {dense}, 0");
});

test("every text that the page asks for by a fixed key exists", () => {
  const folder = new URL("../../web/", import.meta.url);
  const sources = readdirSync(folder, { recursive: true }).filter((name) => /\.m?js$/.test(name));
  const keys = sources.flatMap((name) =>
    [...readFileSync(new URL(name, folder), "utf8").matchAll(/\b(?:t|text)\("([\w.]+)"/g)].map(([, key]) => key));
  assert.ok(keys.length > 40);
  const missing = keys.filter((key) => typeof key.split(".").reduce((at, part) => at?.[part], english.d2m) !== "string");
  assert.deepEqual(missing, []);
});

test("a patch is named by its row and column, a word by its piece", async () => {
  await load({ en: english });
  const trace = new Trace(description());
  const state = { traces: [trace], mainIndex: 0, sampleOf: () => 0 };
  assert.equal(tokenName(state, { of: "image", index: 2 }), "patch row 2, column 1");
  assert.equal(tokenName(state, { of: "text", index: 1 }), "token 2 “fox”");
  trace.meta.prompt = null;
  assert.equal(tokenName(state, { of: "text", index: 1 }), "token 2");
});

test("the settings of a step are named; a step without any says its number", async () => {
  await load({ en: english });
  const steps = [
    { settings: { top_k: 2, gate: "sum", active_blocks: [3, 4], capacity: null } },
    { settings: {} },
  ];
  const state = { traces: [{ steps }], stepOf: () => 0 };
  assert.equal(settingsOf(state, 0), "Top-K 2 · active blocks 3/4");
  assert.equal(settingsOf({ ...state, stepOf: () => 1 }, 0), "step 2 of 2");
});

test("under a budget the Top-K of the shown layer is named", async () => {
  await load({ en: english });
  const steps = [{ settings: { gate: "sum", top_k_by_ffn: { "single_blocks.0": 5, "single_blocks.1": 0 } } }];
  const layers = [{ name: "single_blocks.0" }, { name: "single_blocks.1" }];
  const state = { traces: [{ steps }], stepOf: () => 0, main: { layers }, layer: 0 };
  assert.equal(settingsOf(state, 0), "Top-K 5");
  assert.equal(settingsOf({ ...state, layer: 1 }, 0), "Top-K 0");
});

test("padding is the run of equal pieces at the prompt's end, after the first of them", () => {
  assert.equal(withoutPadding(["a", "fox", "</s>", "<pad>", "<pad>", "<pad>"]), 3);
  assert.equal(withoutPadding(["a", "fox", "</s>"]), 3);
  assert.equal(withoutPadding([]), 0);
});
