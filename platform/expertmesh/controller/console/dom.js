// Elements, made and kept up to date without being made again.

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function drawing(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Only writes what differs: what a screen reader or a selection holds on to stays. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** One child of `parent` for each item, in their order; kept by key while the key is there. */
export function keep(parent, items, keyOf, make, update) {
  parent.kept ??= new Map();
  const wanted = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    wanted.add(key);
    let node = parent.kept.get(key);
    if (!node) {
      node = make(item);
      parent.kept.set(key, node);
    }
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  for (const [key, node] of parent.kept) {
    if (!wanted.has(key)) {
      node.remove();
      parent.kept.delete(key);
    }
  }
}

/** The options of a select, with what was chosen kept. */
export function choices(select, values, first = null) {
  const all = first === null ? values : ["", ...values];
  if ([...select.options].map((one) => one.value).join("\n") === all.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...all.map((value) => new Option(value === "" ? first : value, value)));
  if (all.includes(chosen)) select.value = chosen;
}
