/** Texts of this pack's widgets in the frontend's language: the key "d2m" of locales/<language>/main.json. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const FALLBACK = "en";
let languages = {};

/** Fetch the texts. Until then, and if that fails, text() returns the keys. */
export async function loadTexts() {
  const response = await api.fetchApi("/i18n");
  if (response.ok) languages = await response.json();
}

/** The text with a key such as "map.step", with {name} replaced by the value of that name. */
export function text(key, values = {}) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? FALLBACK;
  const message = lookUp(languages[language], key) ?? lookUp(languages[FALLBACK], key) ?? key;
  return message.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

function lookUp(messages, key) {
  return key.split(".").reduce((at, part) => at?.[part], messages?.d2m);
}
