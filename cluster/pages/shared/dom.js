// Elements in one expression. Text only ever becomes text: nothing here reads HTML.

/** An element with properties and children (elements or text). */
export function make(name, properties = {}, ...children) {
  const { class: className, ...rest } = properties;
  const element = Object.assign(document.createElement(name), rest);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** An element of a drawing (SVG) with attributes and children. */
export function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Gives an element a text, unless it has it: what did not change is not told again to those who hear the page. */
export function tell(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Makes the children of `parent` show `items`, in their order. Those of a known key stay, focus and all; others are made by
 * `create(item)` or leave. `update(element, item)` brings each up to date.
 */
export function showEach(parent, items, key, create, update) {
  const wanted = new Set(items.map(key));
  const known = new Map();
  for (const child of [...parent.children]) {
    if (wanted.has(child.dataset.key)) known.set(child.dataset.key, child);
    else child.remove();
  }
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    const element = known.get(name) ?? create(item);
    element.dataset.key = name;
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
    update(element, item);
  }
}

export const byId = (id) => document.getElementById(id);
