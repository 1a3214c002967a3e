// Elements in one expression. Text only ever becomes text: nothing here reads HTML.

/** An element with properties and children (elements or text). */
export function make(name, properties = {}, ...children) {
  const { class: className, ...rest } = properties;
  const element = Object.assign(document.createElement(name), rest);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);
