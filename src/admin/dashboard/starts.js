// Cold starts: one in detail, and a list of the latest.

import { attr, byId, h, icon, keyed, setIcon, show, style, text } from './dom.js';
import { Waterfall } from './waterfall.js';
import { ago, duration, number, outcome, phaseColour, phaseName, requestUrl, rough } from './words.js';

const LISTED = 12;

export class Starts {
  constructor(state) {
    this.state = state;
    /** The selected one; otherwise a running one, or else the latest. */
    this.pinned = null;
    this.all = false;
    this.waterfall = new Waterfall();
    this.build();
    byId('of-route').addEventListener('input', () => {
      this.pinned = null;
      this.render();
    });
  }

  build() {
    this.title = h('h3', { id: 'spot-title' });
    this.icon = h('span', { class: 'state-icon' });
    this.word = h('span', { class: 'state-word' });
    this.when = h('span', { class: 'dim when' });
    this.latest = h('button', { type: 'button', class: 'quiet small' }, 'Follow the latest');
    this.latest.addEventListener('click', () => {
      this.pinned = null;
      this.render();
      byId('past-list').querySelector('button')?.focus();
    });
    this.totals = h('dl', { class: 'totals' });
    this.reason = h('div', { class: 'note note-failed' }, icon('failed'), h('div', {}, h('p', { class: 'message' })));
    this.lines = h('details', { class: 'lines' }, h('summary', {}, 'Its last lines'), h('pre', { tabindex: '0', 'aria-label': 'Its last lines' }));
    this.reason.lastElementChild.append(this.lines);
    this.facts = h('dl', { class: 'record-facts' });
    byId('spot').append(
      h('div', { class: 'spot-head' }, this.icon, this.title, this.word, this.when, this.latest),
      this.totals, this.waterfall.node, this.reason, this.facts,
    );
    this.more = h('button', { type: 'button', class: 'wide quiet' });
    this.more.addEventListener('click', () => {
      this.all = !this.all;
      this.render();
    });
    byId('past').append(this.more);
  }

  /** Running and completed ones, newest first. */
  records() {
    const running = [...this.state.routes.values()].filter((route) => route.cold_start).map((route) => route.cold_start);
    return [...running, ...this.state.coldStarts].sort((a, b) => b.id - a.id);
  }

  render() {
    const { state } = this;
    if (!state.about) return;
    const records = this.records();
    this.routesToChoose(records);
    const of = byId('of-route').value;
    const fitting = records.filter((record) => !of || record.route === of);
    const chosen = fitting.find((record) => record.id === this.pinned) ?? fitting.find((record) => !record.outcome) ?? fitting[0];
    this.chosen = chosen;
    text(byId('starts-count'), fitting.length ? number(fitting.length) : '');
    show(byId('spot'), Boolean(chosen));
    show(byId('past'), fitting.length > 0);
    show(byId('no-starts'), !chosen);
    if (!chosen) {
      this.explain();
      return;
    }
    this.spot(chosen);
    const listed = this.all ? fitting : fitting.slice(0, LISTED);
    // One axis for all listed ones, capped so that a very long one does not shrink the others to nothing.
    const lengths = listed.map((record) => record.total_ms).sort((a, b) => a - b);
    const usual = lengths[Math.floor(lengths.length / 2)] ?? 0;
    this.scale = Math.min(lengths.at(-1) ?? 0, usual * 8) || 1;
    keyed(byId('past-list'), listed, (record) => record.id, (record) => this.item(record), (node, record) => this.fillItem(node, record));
    show(this.more, fitting.length > LISTED);
    text(this.more, this.all ? `Show the latest ${LISTED} only` : `Show all ${number(fitting.length)}`);
  }

  beat() {
    if (!this.chosen) return;
    if (!this.chosen.outcome) this.spot(this.chosen);
    for (const node of byId('past-list').children) if (!node.record.outcome) this.fillItem(node, node.record);
  }

  routesToChoose(records) {
    const select = byId('of-route');
    const names = [...new Set(records.map((record) => record.route))].sort();
    if (select.value && !names.includes(select.value)) names.push(select.value);
    const known = [...select.options].slice(1).map((option) => option.value);
    if (known.join('\n') === names.join('\n')) return;
    const chosen = select.value;
    select.replaceChildren(select.options[0], ...names.map((name) => h('option', { value: name }, `of ${name}`)));
    select.value = chosen;
    show(select.parentElement, names.length > 1);
  }

  /** Elapsed time; null for a completed one. */
  elapsed(record) {
    return record.outcome ? null : record.total_ms + this.state.since();
  }

  spot(record) {
    const { state } = this;
    const { word, icon: name } = outcome(record);
    const elapsed = this.elapsed(record);
    const estimates = state.routes.get(record.route)?.estimates;
    text(this.title, record.route);
    setIcon(this.icon, name);
    attr(byId('spot'), 'data-state', name);
    text(this.word, word);
    const age = state.now() - Date.parse(record.started_at);
    text(this.when, `#${record.id}, ${elapsed === null ? ago(age) : `since ${rough(elapsed)}`}`);
    show(this.latest, this.pinned === record.id);
    this.waterfall.update(record, elapsed, comparable(record, estimates, this.records().find((other) => other.route === record.route)));
    this.total(record, elapsed);
    show(this.reason, Boolean(record.reason));
    attr(this.reason, 'class', record.outcome === 'failed' ? 'note note-failed' : 'note note-obstacle');
    text(this.reason.querySelector('.message'), record.reason ?? '');
    const lines = record.last_lines ?? [];
    show(this.lines, lines.length > 0);
    text(this.lines.querySelector('pre'), lines.join('\n'));
    const facts = [['pod', record.pod], ['node', record.node], ['request', record.request_id], ['trace', record.trace_id]].filter(([, value]) => value);
    show(this.facts, facts.length > 0);
    keyed(this.facts, facts, ([name]) => name, ([name]) => h('div', {}, h('dt', {}, name), h('dd', {}, name === 'request' ? h('a') : h('span'))), (node, [name, value]) => {
      const content = node.lastElementChild.firstElementChild;
      text(content, value);
      if (name === 'request') attr(content, 'href', requestUrl(value));
    });
  }

  total(record, elapsed) {
    const totals = [
      ['T_actuation', record.t_actuation_ms, 'first request → ready'],
      ['T_first_token', record.t_first_token_ms, 'ready → first token'],
      ['T_e2e', record.t_e2e_ms, 'first request → first token'],
    ].filter(([, ms]) => ms !== undefined && ms !== null).map(([name, ms, what]) => ({ name, value: duration(ms), what }));
    if (elapsed !== null) totals.unshift({ name: 'so far', value: rough(elapsed), what: `now: ${phaseName(record.phases.at(-1)?.name ?? 'signal')}` });
    else if (record.t_e2e_ms === undefined) totals.push({ name: 'total', value: duration(record.total_ms), what: record.outcome === 'completed' ? 'first request → first byte' : 'until it ended' });
    const left = [[record.failed, 'failed'], [record.left, 'left']].filter(([n]) => n > 0).map(([n, word]) => `${number(n)} ${word}`);
    totals.push({ name: 'held', value: number(record.held_peak), what: [`${number(record.released)} served`, ...left].join(', ') });
    keyed(this.totals, totals, (total) => total.name, (total) => h('div', {}, h('dt', {}, total.name), h('dd', { class: 'number' }), h('dd', { class: 'label' })), (node, total) => {
      text(node.children[1], total.value);
      text(node.children[2], total.what);
    });
  }

  item(record) {
    const parts = ['state-icon', 'past-route', 'strip', 'past-total', 'past-when'].map((name) => h('span', { class: name }));
    const button = h('button', { type: 'button' }, ...parts);
    button.addEventListener('click', () => {
      this.pinned = record.id;
      this.render();
      if (byId('spot').getBoundingClientRect().top < 0) byId('spot').scrollIntoView({ block: 'start' });
    });
    return h('li', {}, button);
  }

  fillItem(node, record) {
    node.record = record;
    const button = node.firstElementChild;
    const [state, route, strip, total, when] = button.children;
    const { word, icon: name } = outcome(record);
    const elapsed = this.elapsed(record);
    const whole = elapsed ?? record.total_ms;
    setIcon(state, name);
    attr(node, 'data-state', name);
    attr(button, 'aria-pressed', record.id === this.chosen?.id ? 'true' : 'false');
    text(route, record.route);
    text(total, elapsed === null ? duration(whole) : rough(whole));
    const age = ago(this.state.now() - Date.parse(record.started_at));
    text(when, elapsed !== null ? word : record.outcome === 'failed' ? `failed ${age}` : record.outcome === 'abandoned' ? `abandoned ${age}` : age);
    attr(button, 'title', record.reason ? `${word}: ${record.reason}` : word);
    const spans = record.phases.map((phase) => ({ ...phase, ms: phase.duration_ms }));
    const last = spans.at(-1);
    if (elapsed !== null && last?.unfinished) last.ms = Math.max(last.ms, elapsed - last.start_ms);
    // Skip segments too short to see.
    const visible = spans.filter((span) => span.ms > whole / 200);
    attr(strip, 'data-cut', whole > this.scale);
    const scale = Math.max(this.scale, elapsed ?? 0);
    const shrink = whole > scale ? scale / whole : 1;
    keyed(strip, visible, (span) => span.name, (span) => {
      const node = h('span');
      style(node, '--colour', phaseColour(span.name));
      attr(node, 'data-cut', record.outcome === 'failed' && span.unfinished);
      return node;
    }, (node, span) => style(node, 'width', `${((100 * span.ms * shrink) / scale).toFixed(3)}%`));
  }

  /** Shows how to trigger a first cold start. */
  explain() {
    const { port, model } = this.state.about;
    const box = byId('no-starts');
    if (box.dataset.for === `${port} ${model}`) return;
    box.dataset.for = `${port} ${model}`;
    const body = JSON.stringify({ model: model ?? 'MODEL', stream: true, messages: [{ role: 'user', content: 'Who is at the door?' }] }).replaceAll("'", "'\\''");
    const command = `curl -N http://${location.hostname}:${port}/v1/chat/completions \\\n  -H 'content-type: application/json' \\\n  -d '${body}'`;
    const copy = h('button', { type: 'button', class: 'quiet small' }, 'Copy');
    copy.addEventListener('click', async () => {
      // The clipboard may be unavailable; the text can be selected instead.
      await navigator.clipboard?.writeText(command).then(() => text(copy, 'Copied'), () => {});
    });
    box.replaceChildren(h('h3', {}, 'No cold start yet'), h('p', {}, 'Ask for a model while nothing runs, and watch it here:'), h('div', { class: 'code' }, h('pre', { tabindex: '0', 'aria-label': 'Command' }, h('code', {}, command)), copy));
  }
}

/** Estimates that apply to this one: based on other successful cold starts of its kind. */
function comparable(record, estimates, latest) {
  if (!estimates || record.outcome === 'failed' || record.kind !== latest.kind) return undefined;
  return record.outcome && estimates.count < 2 ? undefined : estimates;
}
