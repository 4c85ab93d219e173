const nodes = [];
const links = [];

export const app = {
  extensions: [],
  registerExtension(extension) {
    this.extensions.push(extension);
  },
  rootGraph: {
    nodes,
    links,
    getNodeById: (id) => nodes.find((node) => node.id === id),
    getLink: (id) => links[id],
  },
  canvas: { setDirty() {} },
  extensionManager: {
    setting: { get: (name) => (name === "Comfy.Locale" ? new URLSearchParams(location.search).get("locale") ?? "en" : undefined) },
    workflow: {
      activeWorkflow: {
        changeTracker: {
          checkState() {
            localStorage.setItem("workflow", JSON.stringify(nodes.find((node) => node.comfyClass === "D2MExpertMap").properties));
          },
        },
      },
      openWorkflows: [],
    },
  },
};
