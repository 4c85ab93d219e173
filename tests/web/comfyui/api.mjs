// ComfyUI's scripts/api.js: events, and a fetchApi that each test replaces.

class Api extends EventTarget {
  async fetchApi(path) {
    throw new Error(`The test expected no request, but ${path} was fetched.`);
  }

  /** Send an event as the server does. */
  emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

export const api = new Api();
