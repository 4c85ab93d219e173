// The sliders for step and block, and the button that plays the steps.

import { choice, h, say, set, show } from "./dom.mjs";
import { text as t } from "../text.mjs";

const FRAME = 180; // ms per step while playing

function slider(label, oninput) {
  return h("input", {
    type: "range", min: "0", step: "1", "aria-label": label, oninput: (event) => oninput(Number(event.target.value)),
  });
}

export function scrubbers(state) {
  let timer = null;
  const play = h("button", { type: "button", class: "d2m-play", onclick: () => (timer ? stop() : start()) });
  const step = slider(t("map.step"), (value) => {
    stop();
    state.set({ step: value });
  });
  const stepText = h("output", { class: "d2m-value" });
  const block = slider(t("map.block"), (value) => state.set({ block: state.main.blocks[value].name }));
  const blockText = h("output", { class: "d2m-value" });
  const stream = choice(t("map.stream"), [
    ["image", t("map.stream_image"), t("map.stream_image_title")],
    ["text", t("map.stream_text"), t("map.stream_text_title")],
  ], (value) => state.set({ stream: value }));

  function start() {
    if (state.view.step >= state.steps - 1) state.set({ step: 0 });
    timer = setInterval(() => {
      if (!state.ready || !play.isConnected) stop();
      else if (state.busy) return; // the step is still being fetched
      else if (state.view.step >= state.steps - 1) stop();
      else state.set({ step: state.view.step + 1 });
    }, FRAME);
    render();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    if (state.ready) render();
  }

  function render() {
    const { view, main } = state;
    say(play, timer ? "❚❚" : "▶");
    set(play, "aria-label", t(timer ? "map.pause" : "map.play"));
    set(play, "title", t(timer ? "map.pause" : "map.play"));
    play.disabled = state.steps < 2;
    set(step, "max", state.steps - 1);
    step.value = view.step;
    step.disabled = state.steps < 2;
    const sigma = main.steps[state.mainStep].sigma;
    const steps = t("map.step_of", { step: view.step + 1, steps: state.steps });
    say(stepText, `${steps} · σ ${Number(sigma).toFixed(3)}`);
    set(step, "aria-valuetext", stepText.textContent);
    set(block, "max", main.blocks.length - 1);
    block.value = state.blockIndex;
    const name = main.layers[state.layer].name;
    const ran = main.ran(state.mainStep, state.mainSample, state.layer);
    say(blockText, ran ? name : t("map.not_run", { name }));
    set(block, "aria-valuetext", blockText.textContent);
    const { image, text } = state.block;
    stream.render(view.stream, [image === null && "image", text === null && "text"]);
    show(stream.element, main.blocks.some((other) => other.text !== null));
  }

  const element = h("div", { class: "d2m-scrub" },
    h("div", {}, play, h("span", { class: "d2m-label" }, t("map.step")), step, stepText),
    h("div", {}, h("span"), h("span", { class: "d2m-label" }, t("map.block")), block, blockText, stream.element));
  return { element, render, stop };
}
