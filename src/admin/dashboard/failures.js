// Recently failed requests with their timelines.

import { attr, byId, h, keyed, show, text } from './dom.js';
import { ago, duration, requestUrl } from './words.js';

const URL = 'api/v1/requests?outcome=failed&limit=20';
/** Polling interval in milliseconds while the page is live. */
const EVERY = 5_000;

const OUTCOMES = {
  completed: 'the model server returned an error',
  client_gone: 'the client disconnected',
  cold_start_timeout: 'timed out while held',
  cold_start_failed: 'the start failed',
  upstream_error: 'the model server failed',
  client_stalled: 'the client stopped reading',
  draining: 'this replica shut down',
  internal: 'a bug in Anteroom',
  hold_queue_full: 'rejected: the hold queue is full',
  saturated: 'rejected: at capacity, and the hold queue is full',
  no_wait: 'rejected: it asked not to wait',
  autoscaling_paused: 'rejected: autoscaling is paused',
};
const outcomeName = (name) => OUTCOMES[name] ?? String(name).replaceAll('_', ' ');

export class Failures {
  constructor(state) {
    this.state = state;
    this.asked = -Infinity;
    this.list = byId('failed-list').appendChild(h('ul', { class: 'failures' }));
  }

  /** Called with every event, so it polls only while connected and visible. */
  render() {
    for (const node of this.list.children) node.when();
    if (this.asking || performance.now() - this.asked < EVERY) return;
    this.asked = performance.now();
    this.asking = this.ask().finally(() => (this.asking = null));
  }

  async ask() {
    try {
      const answer = await fetch(URL, { headers: { accept: 'application/json' }, cache: 'no-store' });
      if (!answer.ok) return;
      const { requests } = await answer.json();
      show(byId('failed'), requests.length > 0);
      keyed(this.list, requests, (request) => `${request.request_id} ${request.arrived_at}`, (request) => this.item(request), () => {});
    } catch {
      // The event stream reports a lost connection.
    }
  }

  item(request) {
    const { state } = this;
    const when = h('span', { class: 'dim failure-when' });
    const status = request.status ? `${request.status}, ` : '';
    const node = h('li', {}, h('details', {},
      h('summary', {}, h('span', { class: 'failure-head' }, when, h('strong', {}, request.route), h('span', {}, `${status}${outcomeName(request.outcome)}`), h('span', { class: 'dim' }, `after ${duration(request.total_ms)}`))),
      request.reason ? h('p', { class: 'message' }, request.reason) : null,
      h('ol', { class: 'events', 'aria-label': 'What happened' }, ...request.events.map((moment) => h('li', {}, h('span', { class: 'at' }, duration(moment.at_ms)), h('span', {}, inWords(moment))))),
      h('p', { class: 'dim' }, 'Request ', h('a', { href: requestUrl(request.request_id) }, h('code', {}, request.request_id)))));
    node.when = () => text(when, ago(state.now() - Date.parse(request.arrived_at)));
    node.when();
    attr(node, 'data-outcome', request.outcome);
    return node;
  }
}

/** Formats an event as a line. */
function inWords(moment) {
  const { event, endpoint, reason, position, status } = moment;
  switch (event) {
    case 'held':
      return `held, at place ${position}`;
    case 'early_answer':
      return 'its 200 goes out early, and it hears how the wait goes';
    case 'dispatched':
      return `sent to ${endpoint}`;
    case 'dispatch_failed':
      return `${endpoint} did not answer: ${reason}`;
    case 'fell_back':
      return 'goes to the fallback';
    case 'first_byte':
      return `its answer begins, with ${status}`;
    case 'ended':
      return `ended: ${outcomeName(moment.outcome)}`;
    default:
      return String(event).replaceAll('_', ' ');
  }
}
