// A trace that a test can check by hand: 2 x 2 patches, 3 text tokens, 2 steps, 1 sample, 2 experts chosen of 4.

/** What the server says of the trace: a double block (two layers), then a single block that skips step 1. */
export function description(id = "one", changes = {}) {
  return {
    version: 1,
    id,
    grid: { height: 2, width: 2 },
    text_tokens: 3,
    slots: 2,
    samples: [{ index: 0, cond: "positive", prompt: 0, image: 0 }],
    layers: [
      { name: "double_blocks.0.img_mlp", stream: "img", experts: 4 },
      { name: "double_blocks.0.txt_mlp", stream: "txt", experts: 4 },
      { name: "single_blocks.0", stream: "joint", experts: 4 },
    ],
    groups: [{ kind: "single", first: 0, blocks: 1 }],
    steps: [
      stepMeta(1, [true, true, true], [[4, 2, 1, 1], [6, 0, 0, 0], [7, 7, 0, 0]]),
      stepMeta(0.5, [true, true, false], [[2, 2, 2, 2], [3, 3, 0, 0], [0, 0, 0, 0]]),
    ],
    prompt: [["▁a", "▁fox", "</s>"]],
    ...changes,
  };
}

function stepMeta(sigma, ran, load) {
  return { sigma, settings: { top_k: 2 }, samples: [{ ran, load, blocks: [[ran[2]]] }] };
}

/** The bytes of a layer: (best, second) experts, gates and margin of each token. */
function layer(best, second) {
  const experts = best.flatMap((expert, token) => [expert, second[token]]);
  const gates = best.flatMap(() => [204, 51]);
  const margin = best.map((_, token) => 10 * (token + 1));
  return [...experts, ...gates, ...margin];
}

/** The bytes of step 0 or 1. 255: no expert. */
export function stepBytes(step) {
  const image = layer(step === 0 ? [0, 1, 2, 3] : [1, 1, 2, 3], [1, 0, 0, 0]);
  const text = layer([0, 0, 255], [1, 2, 255]);
  const joint = layer([3, 3, 3, 0, 1, 0, 1], [0, 0, 0, 1, 0, 1, 0]);
  return step === 0 ? [...image, ...text, ...joint] : [...image, ...text];
}

export const buffer = (step) => new Uint8Array(stepBytes(step)).buffer;
