// ComfyUI's scripts/app.js, as far as the modules under test use it. Tests set its properties.

export const app = {
  rootGraph: { nodes: [] },
  extensionManager: {},
};
