// Entry point: holds the state sent by the server and renders each part of the page.

import { attr, byId, show, text } from './dom.js';
import { follow } from './stream.js';
import { KEPT } from './spark.js';
import { Routes } from './routes.js';
import { Starts } from './starts.js';
import { Failures } from './failures.js';
import { count, duration, number, span } from './words.js';

/** Number of cold starts in the server's snapshot. */
const COLD_STARTS = 50;

const state = {
  about: null,
  names: [],
  routes: new Map(),
  /** Held requests by route, oldest first. */
  held: new Map(),
  /** Completed ones, newest first. */
  coldStarts: [],
  /** Local time of the last update. */
  toldAt: 0,
  /** Milliseconds since the last update. */
  since: () => performance.now() - state.toldAt,
  /** Current time of the server. */
  now: () => state.about.now_ms + state.since(),
};

const routes = new Routes(state);
const starts = new Starts(state);
const failures = new Failures(state);

function take(name, told) {
  const complete = name === 'snapshot';
  const before = complete ? Infinity : state.about?.tick ?? Infinity;
  state.about = told.about;
  state.toldAt = performance.now();
  if (complete) {
    state.routes.clear();
    state.held.clear();
    state.coldStarts = [];
  }
  if (told.names) {
    state.names = told.names;
    const names = new Set(told.names);
    for (const known of [state.routes, state.held]) for (const key of known.keys()) if (!names.has(key)) known.delete(key);
  }
  for (const route of told.routes) state.routes.set(route.name, route);
  // A skipped update would have had the same values.
  const ticks = Math.min(KEPT, told.about.tick - before);
  for (const name of state.names) {
    // A route may have any name, even that of an Object property.
    const heldNow = Object.hasOwn(told.held, name) ? told.held[name] : complete ? [] : 0;
    const values = complete ? heldNow : (state.held.get(name) ?? []);
    for (let tick = 0; tick < ticks; tick += 1) values.push(heldNow);
    if (values.length > KEPT) values.splice(0, values.length - KEPT);
    state.held.set(name, values);
  }
  if (told.cold_starts.length > 0) {
    const ids = new Set(told.cold_starts.map((record) => record.id));
    const all = [...told.cold_starts, ...state.coldStarts.filter((record) => !ids.has(record.id))];
    state.coldStarts = all.sort((a, b) => b.id - a.id).slice(0, COLD_STARTS);
  }
  render();
}

function render() {
  const { about } = state;
  const all = state.names.map((name) => state.routes.get(name)).filter(Boolean);
  text(byId('version'), about.version);
  text(byId('instance'), about.instance);
  text(byId('uptime'), span(about.uptime_ms));
  const peers = Object.entries(about.peers);
  show(byId('peers'), peers.length > 0);
  text(byId('peers').lastElementChild, peers.filter(([, n]) => n > 0).map(([name, n]) => `${n} ${name}`).join(', ') || 'none');
  show(byId('draining'), about.draining);
  show(byId('awaits'), about.awaits_routes);

  const sum = (of) => all.reduce((total, route) => total + of(route), 0);
  const held = sum((route) => route.held);
  const ready = all.filter((route) => route.state === 'ready').length;
  text(byId('sum-held'), number(held));
  attr(byId('sum-held').parentElement, 'data-on', held > 0);
  text(byId('sum-flight'), number(sum((route) => route.in_flight)));
  text(byId('sum-ready'), number(ready));
  text(byId('sum-ready-label'), `of ${count(all.length, 'route')} ready`);
  const last = state.coldStarts.find((record) => record.outcome === 'completed');
  text(byId('sum-last'), last ? duration(last.total_ms) : '–');
  text(byId('sum-last-label'), last ? `last cold start, ${last.route}` : 'last cold start');
  document.title = held > 0 ? `${number(held)} held · Anteroom` : 'Anteroom';

  routes.render();
  starts.render();
  failures.render();
}

function link(name, why) {
  const words = { connecting: 'connecting', live: 'live', lost: 'connection lost' };
  if (name === 'connecting' && document.body.dataset.link === 'lost') return; // It stays so until it is not.
  document.body.dataset.link = name;
  text(byId('link-text'), words[name]);
  show(byId('lost'), name === 'lost');
  if (name === 'lost') {
    const age = state.about ? ` What is shown is as it was at ${new Date(Date.now() - state.since()).toLocaleTimeString()}.` : '';
    text(byId('lost'), `Connection lost: ${why}. Trying again.${age}`);
  }
}

let stop = null;
function connect() {
  // A hidden page needs no updates, and browsers limit connections per origin.
  if (document.visibilityState === 'hidden') {
    stop?.();
    stop = null;
  } else {
    stop ??= follow('api/v1/events', take, link);
  }
}
document.addEventListener('visibilitychange', connect);
connect();

// Elapsed times advance between updates.
const still = matchMedia('(prefers-reduced-motion: reduce)');
let lastBeat = 0;
setInterval(() => {
  const due = performance.now() - lastBeat >= (still.matches ? 1000 : 100);
  if (!due || !state.about || document.body.dataset.link !== 'live') return;
  lastBeat = performance.now();
  routes.beat();
  starts.beat();
}, 100);
