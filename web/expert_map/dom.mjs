// Helpers to make and update elements.

/** Make an element. Properties named `on*` become event listeners, all others attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else set(element, name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Set an attribute, or remove it for null, undefined and false. Does nothing if it has that value already. */
export function set(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

/** Set an element's text, if it is another one. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show or hide an element. */
export function show(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

let ids = 0;
export function uniqueId() {
  return `d2m-map-${++ids}`;
}

/** Let arrow keys, Home and End move the focus within a group of elements. */
export function rove(group, selector, { onmove, vertical = false }) {
  group.addEventListener("keydown", (event) => {
    const items = [...group.querySelectorAll(selector)].filter((item) => !item.hidden);
    const at = items.indexOf(document.activeElement);
    if (at < 0) return;
    const [before, after] = vertical ? ["ArrowUp", "ArrowDown"] : ["ArrowLeft", "ArrowRight"];
    const [before2, after2] = vertical ? ["ArrowLeft", "ArrowRight"] : ["ArrowUp", "ArrowDown"];
    const key = event.key;
    let to;
    if (key === before || key === before2) to = at - 1;
    else if (key === after || key === after2) to = at + 1;
    else if (key === "Home") to = 0;
    else if (key === "End") to = items.length - 1;
    else return;
    event.preventDefault();
    const item = items[(to + items.length) % items.length];
    tabStop(items, item);
    item.focus();
    onmove?.(item);
  });
}

/** Let Tab reach only one of the items. */
export function tabStop(items, one) {
  for (const item of items) set(item, "tabindex", item === one ? "0" : "-1");
}

/** Make a group of buttons of which one is pressed: {element, render(value, disabled values)}. */
export function choice(label, options, onchoose) {
  const element = h("div", { class: "d2m-choice", role: "radiogroup", "aria-label": label });
  const buttons = options.map(([value, text, title]) => h("button", {
    type: "button", role: "radio", "data-value": value, title: title ?? text, onclick: () => onchoose(value),
  }, text));
  element.append(...buttons);
  rove(element, "button:not([disabled])", { onmove: (button) => onchoose(button.dataset.value) });
  return {
    element,
    render(value, disabled = []) {
      for (const button of buttons) {
        set(button, "aria-checked", String(button.dataset.value === value));
        button.disabled = disabled.includes(button.dataset.value);
      }
      tabStop(buttons, buttons.find((button) => button.dataset.value === value) ?? buttons[0]);
    },
  };
}
