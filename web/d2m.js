/** The pack's extension of ComfyUI's frontend. ComfyUI loads only this file by itself, since the others end in .mjs. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { watchCosts } from "./cost.mjs";
import { setup as setUpExpertMaps } from "./expert_map/index.mjs";
import { CONTROLS, onLive, watchLiveValues } from "./live.mjs";
import { addReadout, addStyle, hasReadout, showLive } from "./readout.mjs";
import { loadTexts, text } from "./text.mjs";

const WITH_READOUT = new Set([...CONTROLS, "D2MLoadFluxMoE", "D2MConvertFlux"]);

const MODULE = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2)); // the pack's folder

/** List this pack's templates by name: ComfyUI lists files in the order of the file system. */
function sortTemplates() {
  const { getWorkflowTemplates } = api;
  api.getWorkflowTemplates = async function (...given) {
    const templates = await getWorkflowTemplates.apply(this, given);
    templates[MODULE]?.sort();
    return templates;
  };
}

setUpExpertMaps(app, api);

app.registerExtension({
  name: "dense2moe",

  async setup() {
    addStyle();
    sortTemplates();
    await loadTexts();
    watchLiveValues();
    watchCosts();
    const shown = new Set();
    onLive((place, values) => {
      if (place && hasReadout(place.node)) {
        const settings = Object.entries(values).map((entry) => entry.join(" = "));
        showLive(place.node, text("live.label"), text("live.title", { settings: settings.join(", ") }));
        shown.add(place.node);
      } else {
        for (const node of shown) showLive(node, "");
        shown.clear();
      }
    });
  },

  nodeCreated(node) {
    if (WITH_READOUT.has(node.comfyClass)) addReadout(node);
  },
});
