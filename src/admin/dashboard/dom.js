// DOM helpers that never parse HTML: data from the server only becomes text.

const SVG = 'http://www.w3.org/2000/svg';

/** Creates an element with attributes and children; strings become text nodes. */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) attr(node, name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Creates an SVG element. */
export function s(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) attr(node, name, value);
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Sets an attribute if it differs; null and false remove it. */
export function attr(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else {
    const text = value === true ? '' : String(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
}

/** Sets the text if it differs, to avoid repaints and announcements by screen readers. */
export function text(node, value) {
  const content = String(value);
  if (node.textContent !== content) node.textContent = content;
}

/** Shows or hides. */
export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/** Sets a style property; the content security policy only forbids style attributes. */
export function style(node, name, value) {
  if (node.style.getPropertyValue(name) !== value) node.style.setProperty(name, value);
}

/**
 * Reconciles the children of `parent` with `items`, in order. A key keeps its node, and focus is preserved.
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

/** Paths of the icons: 16 by 16, in the colour of the text. */
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

/** Creates a decorative icon; the text beside it has the same meaning. */
export function icon(name) {
  const paths = (ICONS[name] ?? ICONS.idle).map((d) => s('path', { d }));
  return s('svg', { class: `icon icon-${name}`, viewBox: '0 0 16 16', 'aria-hidden': 'true' }, ...paths);
}

/** Replaces an icon if it differs. */
export function setIcon(holder, name) {
  if (holder.dataset.icon === name) return;
  holder.dataset.icon = name;
  holder.replaceChildren(icon(name));
}
