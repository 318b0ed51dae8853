// Nodes without markup: what comes from outside becomes text, never HTML.

const SVG = 'http://www.w3.org/2000/svg';

/** An element with these attributes and children. `class`, `data-…` and the like are attributes; text is text. */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) attr(node, name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** The same in SVG. */
export function s(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) attr(node, name, value);
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Sets an attribute if it is another one; null and false take it away. */
export function attr(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else {
    const text = value === true ? '' : String(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
}

/** Sets the text if it is another one, so that nothing is painted or read out anew for nothing. */
export function text(node, value) {
  const content = String(value);
  if (node.textContent !== content) node.textContent = content;
}

/** Shows or hides. */
export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/** Sets a property of its style. The policy of the page forbids style attributes, not this. */
export function style(node, name, value) {
  if (node.style.getPropertyValue(name) !== value) node.style.setProperty(name, value);
}

/**
 * Makes the children of `parent` those of `items`, in their order; the child of a key stays the same node. What is focused
 * stays so.
 */
export function keyed(parent, items, keyOf, create, update) {
  const known = (parent.known ??= new Map());
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const wanted = new Set();
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    wanted.add(key);
    let node = known.get(key);
    if (!node) known.set(key, (node = create(item)));
    update(node, item);
    if (node === next) next = next.nextElementSibling;
    else parent.insertBefore(node, next);
  }
  for (const [key, node] of known) {
    if (!wanted.has(key)) {
      node.remove();
      known.delete(key);
    }
  }
  if (focused && focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
}

/** What stands in the icons: 16 by 16, drawn in the colour of the text. */
const ICONS = {
  ready: ['M8 1.5a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13Z', 'M5 8.2 7.2 10.4 11.2 6'],
  starting: ['M8 1.5a6.5 6.5 0 1 1-6.5 6.5'],
  idle: ['M8 1.5a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13Z'],
  stopping: ['M8 1.5a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13Z', 'M8 4.800v6', 'M5.3 8.4 8 11.100l2.7-2.7'],
  failed: ['M8 1.5a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13Z', 'M5.6 5.600l4.8 4.8', 'M10.4 5.6 5.6 10.4'],
  sleeping: ['M13.6 9.800A6 6 0 0 1 6.2 2.4a6 6 0 1 0 7.4 7.400Z'],
  obstacle: ['M8 2 15 14H1Z', 'M8 6.600v3.2', 'M8 11.900v.2'],
  abandoned: ['M8 1.5a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13Z', 'M4.8 8h6.4'],
};

/** An icon; it says nothing that does not stand beside it in words. */
export function icon(name) {
  const paths = (ICONS[name] ?? ICONS.idle).map((d) => s('path', { d }));
  return s('svg', { class: `icon icon-${name}`, viewBox: '0 0 16 16', 'aria-hidden': 'true' }, ...paths);
}

/** Replaces an icon if it is another one. */
export function setIcon(holder, name) {
  if (holder.dataset.icon === name) return;
  holder.dataset.icon = name;
  holder.replaceChildren(icon(name));
}
