// Routes and their current state.

import { attr, byId, h, icon, keyed, setIcon, show, style, text } from './dom.js';
import { draw, sparkline } from './spark.js';
import { STATES, count, number, obstacleName, phaseColour, phaseName, rough, span } from './words.js';

/** Number of routes shown by default. */
const FIRST = 12;
/** Delay in milliseconds by which announcements of changes are combined. */
const SAY_AFTER = 1_500;

export class Routes {
  constructor(state) {
    this.state = state;
    this.all = false;
    /** Last announced state of each route. */
    this.said = null;
    this.cards = new Map();
    for (const id of ['find', 'order', 'state']) byId(id).addEventListener('input', () => this.render());
    for (const name of STATES) byId('state').append(h('option', { value: name }, name));
    byId('all-routes').addEventListener('click', () => {
      this.all = !this.all;
      this.render();
    });
    document.addEventListener('keydown', (event) => {
      const typing = event.target.closest?.('input, select, textarea');
      if (event.key === '/' && !typing && !event.ctrlKey && !event.metaKey && !event.altKey && !byId('routes-tools').hidden) {
        event.preventDefault();
        byId('find').focus();
      } else if (event.key === 'Escape' && event.target === byId('find')) {
        byId('find').value = '';
        this.render();
      }
    });
  }

  render() {
    const { state } = this;
    if (!state.about) return;
    const all = state.names.map((name) => state.routes.get(name)).filter(Boolean);
    const [words, only, order] = [byId('find').value.toLowerCase().split(/\s+/), byId('state').value, byId('order').value];
    const fits = (route) => (!only || route.state === only) && words.every((word) => route.name.toLowerCase().includes(word));
    const busy = new Set(all.filter((route) => state.held.get(route.name)?.some(Boolean)).map((route) => route.name));
    const rank = (route) => rankOf(route, busy.has(route.name));
    const orders = { name: byName, held: (a, b) => b.held - a.held || byName(a, b), activity: (a, b) => rank(a) - rank(b) || byName(a, b) };
    const fitting = all.filter(fits).sort(orders[order]);
    const shown = this.all ? fitting : fitting.slice(0, FIRST);
    show(byId('routes-tools'), all.length > 3);
    text(byId('routes-count'), fitting.length === all.length ? number(all.length) : `${number(fitting.length)} of ${number(all.length)}`);
    keyed(byId('cards'), shown, (route) => route.name, (route) => card(route), (node, route) => node.card.update(route, state));
    const more = fitting.length > FIRST;
    show(byId('all-routes'), more);
    if (more) text(byId('all-routes'), this.all ? `Show the first ${FIRST} only` : `Show all ${number(fitting.length)}`);
    show(byId('no-routes'), fitting.length === 0);
    if (fitting.length === 0) {
      const none = state.about.awaits_routes
        ? 'The routes of the cluster are not known yet.'
        : 'No routes. Add one under `routes:` in the configuration: it is read again when it changes.';
      text(byId('no-routes'), all.length === 0 ? none : 'No route fits.');
    }
    this.say(all);
  }

  /** Advances elapsed times between events. */
  beat() {
    for (const node of byId('cards').children) node.card.beat(this.state);
  }

  /** Announces changes of state to screen readers. */
  say(all) {
    const now = new Map(all.map((route) => [route.name, route.state]));
    if (!this.said) {
      this.said = now;
      return;
    }
    this.now = now;
    if (this.saying || all.every((route) => this.said.get(route.name) === route.state)) return;
    this.saying = setTimeout(() => {
      this.saying = null;
      const changed = [...this.now].filter(([name, is]) => this.said.get(name) !== is);
      this.said = this.now;
      const words = changed.map(([name, is]) => `${name} is ${is}`);
      if (words.length > 0) text(byId('said'), words.length > 3 ? `${words.length} routes have changed` : words.join(', '));
    }, SAY_AFTER);
  }
}

const byName = (a, b) => (a.name < b.name ? -1 : 1);
/** Sorts by kind of activity rather than by numbers, so that cards do not move constantly. */
function rankOf(route, wasBusy) {
  if (route.held > 0 || route.cold_start) return 0;
  if (route.obstacle || route.state === 'failed') return 1;
  if (route.in_flight > 0) return 2;
  if (wasBusy) return 3;
  return 4 + STATES.indexOf(route.state);
}

function card(route) {
  const node = h('li', { class: 'card' });
  node.card = new Card(node, route);
  return node;
}

class Card {
  constructor(node, route) {
    this.node = node;
    this.icon = h('span', { class: 'state-icon' });
    this.word = h('span', { class: 'state-word' });
    this.held = h('span', { class: 'number' });
    this.flight = h('span', { class: 'number' });
    this.spark = sparkline();
    this.oldest = h('p', { class: 'oldest' });
    this.phase = h('div', { class: 'phase' });
    this.bar = h('div', { class: 'bar', role: 'progressbar', 'aria-label': `Start of ${route.name}`, 'aria-valuemin': 0, 'aria-valuemax': 100 });
    this.phaseWord = h('span', { class: 'phase-word' });
    this.left = h('span', { class: 'left' });
    this.phase.append(h('p', { class: 'phase-line' }, this.phaseWord, this.left), this.bar);
    this.notice = h('div', { class: 'notice' });
    this.summary = h('summary');
    this.more = h('div', { class: 'more' });
    const details = h('details', {}, this.summary, this.more);
    details.addEventListener('toggle', () => this.route && this.detail(this.route));
    this.details = details;
    node.append(
      h('div', { class: 'card-head' }, this.icon, h('h3', { title: route.name }, route.name), this.word),
      h('div', { class: 'card-figures' },
        h('div', { class: 'figure' }, this.held, h('span', { class: 'label' }, 'held')),
        h('div', { class: 'held-line' }, this.spark.node, this.oldest),
        h('div', { class: 'figure' }, this.flight, h('span', { class: 'label' }, 'in flight'))),
      this.phase,
      this.notice,
      details,
    );
  }

  update(route, state) {
    this.route = route;
    const values = state.held.get(route.name) ?? [];
    attr(this.node, 'data-state', route.state);
    const still = !route.cold_start && route.held === 0 && route.in_flight === 0 && route.endpoints.length === 0 && !values.some(Boolean);
    attr(this.node, 'data-still', still);
    attr(this.node, 'data-quiet', still && !route.obstacle && !route.reason);
    setIcon(this.icon, route.state);
    text(this.word, route.state);
    text(this.held, number(route.held));
    attr(this.held.parentElement, 'data-on', route.held > 0);
    text(this.flight, number(route.in_flight));
    draw(this.spark, values);
    this.notices(route, state);
    const ready = route.endpoints.filter((endpoint) => endpoint.ready).length;
    text(this.summary, route.endpoints.length === 0 ? 'no endpoint' : `${ready} of ${count(route.endpoints.length, 'endpoint')} ready`);
    if (this.details.open) this.detail(route);
    this.beat(state);
  }

  /** Updates elapsed times. */
  beat(state) {
    const { route } = this;
    const since = state.since();
    show(this.oldest, route.oldest_held_ms !== undefined);
    if (route.oldest_held_ms !== undefined) text(this.oldest, `oldest ${rough(route.oldest_held_ms + since)}`);
    show(this.phase, Boolean(route.cold_start));
    if (!route.cold_start) return;
    const elapsed = route.cold_start.total_ms + since;
    const left = route.time_left_ms === undefined ? null : Math.max(0, route.time_left_ms - since);
    const phase = route.cold_start.phases.at(-1)?.name ?? 'signal';
    text(this.phaseWord, `${phaseName(phase)} · ${rough(elapsed)}`);
    text(this.left, leftInWords(route, left));
    this.progress(route, phase, elapsed, left);
  }

  /** Draws completed and expected phases in their colours. */
  progress(route, phase, elapsed, left) {
    const whole = left === null ? elapsed : elapsed + left;
    const parts = route.cold_start.phases.map((part) => ({ ...part }));
    const last = parts.at(-1);
    if (last?.unfinished) last.duration_ms = Math.max(last.duration_ms, elapsed - last.start_ms);
    attr(this.bar, 'data-unknown', left === null);
    const percent = left === null ? null : Math.min(99, Math.round((100 * elapsed) / Math.max(whole, 1)));
    attr(this.bar, 'aria-valuenow', percent);
    attr(this.bar, 'aria-valuetext', percent === null ? `${phaseName(phase)}, no estimate` : `${phaseName(phase)}, ${percent} %`);
    keyed(this.bar, parts, (part) => part.name, (part) => {
      const node = h('span');
      style(node, '--colour', phaseColour(part.name));
      return node;
    }, (node, part) => style(node, 'width', `${((100 * part.duration_ms) / Math.max(whole, 1)).toFixed(2)}%`));
  }

  /** Renders failures and obstacles. */
  notices(route, state) {
    const notices = [];
    if (route.obstacle) {
      const { kind, message, since } = route.obstacle;
      notices.push({ key: `o${kind}`, icon: 'obstacle', title: obstacleName(kind), message, since: Date.parse(since) });
    }
    const last = state.coldStarts.find((record) => record.route === route.name);
    if (route.reason) notices.push({ key: 'failed', icon: 'failed', title: 'Could not be started', message: route.reason });
    // The backoff is over, but there was no request since.
    else if (last?.outcome === 'failed' && !route.cold_start && route.state === 'idle') notices.push({ key: `last ${last.id}`, icon: 'failed', title: 'The last start failed', message: last.reason ?? '', since: Date.parse(last.started_at) });
    show(this.notice, notices.length > 0);
    keyed(this.notice, notices, (notice) => notice.key, (notice) => {
      const node = h('div', { class: `note note-${notice.icon}` }, icon(notice.icon), h('p', {}, h('strong', {}, notice.title), h('span', { class: 'dim' }), h('span', { class: 'message' })));
      return node;
    }, (node, notice) => {
      const [, since, message] = node.lastElementChild.children;
      text(since, notice.since ? ` ${notice.icon === 'obstacle' ? 'since' : 'at'} ${new Date(notice.since).toLocaleTimeString()}` : '');
      text(message, notice.message);
    });
  }

  /** Renders the collapsed details. */
  detail(route) {
    const { limits, estimates } = route;
    const list = this.more.firstElementChild ?? this.more.appendChild(h('ul', { class: 'endpoints', 'aria-label': 'Endpoints' }));
    keyed(list, route.endpoints, (endpoint) => endpoint.address, (endpoint) => h('li', {}, h('span', { class: 'state-icon' }), h('code', {}, endpoint.address), h('span', { class: 'endpoint-state' }), h('span', { class: 'load' })),
      (node, endpoint) => {
        const [state, , word, load] = node.children;
        setIcon(state, endpoint.ready ? 'ready' : 'idle');
        attr(node, 'data-state', endpoint.ready ? 'ready' : 'idle');
        text(word, endpoint.ready ? 'ready' : 'not ready');
        text(load, endpoint.limit > 1e6 ? `${number(endpoint.in_flight)} in flight` : `${number(endpoint.in_flight)} of ${number(endpoint.limit)} in flight`);
      });
    const facts = this.more.children[1] ?? this.more.appendChild(h('p', { class: 'dim' }));
    const words = [`Holds ${count(limits.hold_max_requests, 'request')} at most, each for ${span(limits.hold_timeout_ms)}; ${number(limits.concurrency_max)} in flight on an endpoint.`];
    if (estimates) words.push(`Ready within ${rough(estimates.until_ready.median_ms)} half of the time, within ${rough(estimates.until_ready.p90_ms)} nine times of ten.`);
    text(facts, words.join(' '));
  }
}

function leftInWords(route, left) {
  if (left === null) return route.estimates ? 'longer than usual' : 'no estimate yet';
  return left < 950 ? 'ready any moment' : `about ${span(left)} left`;
}
