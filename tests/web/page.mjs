// As much of a page's document as the elements of web/ need: a tree, attributes, listeners, sizes.

class Style {
  setProperty(name, value) {
    this[name] = value;
  }
}

export class Element extends EventTarget {
  constructor(tag) {
    super();
    Object.assign(this, { tag, children: [], style: new Style(), hidden: false, offsetWidth: 100, offsetHeight: 100 });
    this.attributes = new Map();
    this.text = "";
    this.focusVisible = false;
  }

  get textContent() {
    return this.text + this.children.map(({ textContent }) => textContent).join("");
  }

  set textContent(text) {
    [this.text, this.children] = [String(text), []];
  }

  get id() {
    return this.getAttribute("id");
  }

  append(...children) {
    this.children.push(...children);
  }

  appendChild(child) {
    this.children.push(child);
    return child;
  }

  setAttribute(name, value) {
    this.attributes.set(name, String(value));
  }

  getAttribute(name) {
    return this.attributes.get(name) ?? null;
  }

  hasAttribute(name) {
    return this.attributes.has(name);
  }

  removeAttribute(name) {
    this.attributes.delete(name);
  }

  get classList() {
    const names = () => new Set((this.className ?? "").split(" ").filter(Boolean));
    return {
      contains: (name) => names().has(name),
      toggle: (name, on) => {
        const now = names();
        now[on ? "add" : "delete"](name);
        this.className = [...now].join(" ");
      },
    };
  }

  matches(selector) {
    if (selector !== ":focus-visible") throw new Error(`This page does not know ${selector}.`);
    return this.focusVisible;
  }

  /** On the screen, where the graph's zoom has doubled it. */
  getBoundingClientRect() {
    return { left: 10, top: 20, width: 2 * this.offsetWidth, height: 2 * this.offsetHeight };
  }

  fire(type, properties = {}) {
    const event = Object.assign(new Event(type, { cancelable: true }), properties);
    this.dispatchEvent(event);
    return event;
  }
}

/** Make an empty page the global document. */
export function openPage() {
  globalThis.document = {
    head: new Element("head"),
    activeElement: null,
    createElement: (tag) => new Element(tag),
  };
}
