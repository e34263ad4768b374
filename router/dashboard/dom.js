// Builds and updates elements without markup strings, so that no text from the outside is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element: `h("p", {class: "sub", title: "…"}, "text", child)`. Values null or false leave an attribute out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export const byId = (id) => document.getElementById(id);

/** Sets the text only where it differs: untouched nodes keep selections and are not announced again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value === true ? "" : value);
}

/** Share 0–1 as a CSS length variable; through the CSSOM, which the content security policy allows. */
export function setShare(element, name, share) {
  const text = `${(Math.min(1, Math.max(0, share)) * 100).toFixed(2)}%`;
  if (element.style.getPropertyValue(name) !== text) element.style.setProperty(name, text);
}

/**
 * Makes `parent` hold one child an item, in order, keeping the child of an item that stays.
 * `create(item)` gives an element, `update(element, item)` brings it up to date.
 */
export function keyed(parent, items, key, create, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const seen = new Map();
  let place = parent.firstElementChild;
  for (const item of items) {
    // Two items may share a key (prompts that begin alike): the second is another child.
    const count = seen.get(String(key(item))) ?? 0;
    seen.set(String(key(item)), count + 1);
    const name = count === 0 ? String(key(item)) : `${key(item)} (${count})`;
    const element = known.get(name) ?? create(item);
    element.dataset.key = name;
    known.delete(name);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
    update(element, item);
  }
  for (const left of known.values()) left.remove();
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) setAttribute(element, name, value);
  element.append(...children);
  return element;
}
