/** What the widgets of this pack say, in the language of the frontend: the key "d2m" of locales/<language>/main.json. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const FALLBACK = "en";
let languages = {};

/** Fetch the texts; until then, and where it fails, text() gives the keys back. */
export async function loadTexts() {
  const response = await api.fetchApi("/i18n");
  if (response.ok) languages = await response.json();
}

/** The text "a.b" with {names} put in. */
export function text(key, values = {}) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? FALLBACK;
  const found = lookUp(languages[language], key) ?? lookUp(languages[FALLBACK], key) ?? key;
  return found.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

function lookUp(messages, key) {
  return key.split(".").reduce((at, part) => at?.[part], messages?.d2m);
}
