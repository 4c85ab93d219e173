// Loaded before the tests: lets modules of web/ import ComfyUI's scripts, which exist only in a running ComfyUI.

import { registerHooks } from "node:module";

registerHooks({
  resolve(specifier, context, next) {
    const script = /\/scripts\/(app|api)\.js$/.exec(specifier);
    return next(script ? new URL(`./comfyui/${script[1]}.mjs`, import.meta.url).href : specifier, context);
  },
});
