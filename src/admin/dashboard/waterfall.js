// Waterfall of a cold start: phases as bars on a time axis, with their medians.

import { attr, h, keyed, show, style, text } from './dom.js';
import { duration, partName, phaseColour, phaseMeaning, phaseName, rough, share } from './words.js';

const percent = (part, whole) => `${((100 * part) / Math.max(whole, 0.001)).toFixed(3)}%`;

/** Converts a record's phases to rows; for one running for `elapsed`, adds the expected phases. */
export function rowsOf(record, elapsed, usual) {
  const rows = record.phases.map((phase) => ({ ...phase, kind: phase.unfinished ? 'cut' : 'done' }));
  if (elapsed === null || rows.length === 0) return rows;
  const last = rows.at(-1);
  if (last.unfinished) {
    last.kind = 'runs';
    last.duration_ms = Math.max(last.duration_ms, elapsed - last.start_ms);
  }
  const now = usual.findIndex((phase) => phase.name === last.name);
  let at = last.start_ms + Math.max(last.duration_ms, usual[now]?.median_ms ?? 0);
  const known = new Set(rows.map((row) => row.name));
  for (const phase of usual.slice(now + 1)) {
    if (now < 0 || known.has(phase.name)) continue;
    rows.push({ name: phase.name, start_ms: at, duration_ms: phase.median_ms, kind: 'to come' });
    at += phase.median_ms;
  }
  return rows;
}

/** Returns round ticks for an axis of `whole` milliseconds, at most five steps. */
export function ticks(whole) {
  const rawStep = whole / 5;
  const magnitude = 10 ** Math.floor(Math.log10(Math.max(rawStep, 0.001)));
  // For minutes, ticks are multiples of 5, 10, 30 or 60 minutes.
  const clock = [300e3, 600e3, 1800e3, 3600e3, 7200e3, 21600e3, 86400e3];
  const step = whole > 1000e3 ? (clock.find((step) => step >= rawStep) ?? 86400e3) : magnitude * [1, 2, 5, 10].find((step) => step * magnitude >= rawStep);
  const list = [];
  for (let at = 0; at <= whole * 1.0001; at += step) list.push(at);
  return { step, list };
}

/** Formats `0`, `500 ms`, `2 s`, `30 min`, without trailing zeros. */
function tick(ms) {
  if (ms === 0) return '0';
  if (ms < 1) return `${+ms.toFixed(2)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return ms <= 1000e3 ? `${+(ms / 1e3).toFixed(2)} s` : `${Math.round(ms / 60e3)} min`;
}

export class Waterfall {
  constructor() {
    this.axis = h('div', { class: 'axis', 'aria-hidden': 'true' });
    this.body = h('tbody');
    this.readout = h('p', { class: 'readout' });
    this.table = h('table', { class: 'waterfall' },
      h('caption', { class: 'hidden' }, 'Phases of the cold start'),
      h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, 'phase'), h('th', { scope: 'col', class: 'axis-cell' }, h('span', { class: 'hidden' }, 'when'), this.axis), h('th', { scope: 'col', class: 'took' }, 'took'), h('th', { scope: 'col', class: 'usual' }, 'vs median'))),
      this.body);
    this.node = h('div', { class: 'waterfall-box' }, this.table, this.readout);
    this.whole = 0;
    this.pointed = null;
    const point = (event) => this.point(event.target.closest?.('tr[data-row]')?.dataset.row ?? null);
    for (const name of ['pointerover', 'focusin']) this.body.addEventListener(name, point);
    for (const name of ['pointerleave', 'focusout']) this.body.addEventListener(name, () => this.point(null));
  }

  point(row) {
    this.pointed = row;
    this.read();
  }

  /** Shows a record; `elapsed` is null for a completed one. */
  update(record, elapsed, estimates) {
    const usual = estimates?.phases ?? [];
    const rows = rowsOf(record, elapsed, usual);
    const end = rows.reduce((end, row) => Math.max(end, row.start_ms + row.duration_ms), record.total_ms);
    // While it runs, the axis grows in steps, so that bars do not shrink constantly.
    const grows = elapsed !== null;
    if (!grows || this.id !== record.id || end > this.whole || end < this.whole / 2) this.whole = grows ? end * (usual.length ? 1.02 : 1.3) : end;
    this.id = record.id;
    this.record = record;
    const usualOf = new Map(usual.map((phase) => [phase.name, phase]));
    this.rows = rows.flatMap((row) => [
      { ...row, key: row.name, usual: usualOf.get(row.name), depth: 0 },
      ...(row.parts ?? []).map((part) => ({ ...part, key: `${row.name}/${part.name}`, of: row.name, kind: 'part', depth: 1 })),
    ]);
    const { step, list } = ticks(this.whole);
    style(this.table, '--step', percent(step, this.whole));
    keyed(this.axis, list, (at) => at, (at) => h('span', {}, tick(at)), (node, at) => {
      style(node, 'left', percent(at, this.whole));
      attr(node, 'data-last', at > this.whole * 0.94);
    });
    const compare = this.rows.some((row) => row.usual);
    attr(this.table, 'data-compare', compare);
    keyed(this.body, this.rows, (row) => row.key, (row) => makeRow(row), (node, row) => this.fill(node, row));
    this.read();
  }

  fill(node, row) {
    const { whole } = this;
    const [, trackCell, took, usual] = node.children;
    const [ghost, bar, early] = trackCell.firstElementChild.children;
    attr(node, 'data-kind', row.kind);
    style(bar, 'left', percent(row.start_ms, whole));
    style(bar, 'width', percent(row.duration_ms, whole));
    const blur = Math.min(row.early_ms ?? 0, row.duration_ms);
    show(early, blur > 0);
    if (blur > 0) {
      style(early, 'left', percent(row.start_ms + row.duration_ms - blur, whole));
      style(early, 'width', percent(blur, whole));
    }
    const median = row.usual && row.kind !== 'to come' ? row.usual.median_ms : null;
    show(ghost, median !== null);
    if (median !== null) {
      style(ghost, 'left', percent(row.start_ms, whole));
      style(ghost, 'width', percent(Math.min(median, whole - row.start_ms), whole));
    }
    text(took, tookInWords(row));
    attr(took, 'data-blur', blur > 0);
    const difference = median !== null && row.kind === 'done' ? row.duration_ms - median : null;
    text(usual, row.kind === 'to come' ? 'median' : difference === null ? '' : signed(difference));
    // Slower than the 90th percentile by a relevant margin.
    attr(usual, 'data-slower', difference !== null && row.duration_ms > row.usual.p90_ms && difference > this.record.total_ms / 50);
  }

  /** Shows the numbers of the hovered phase, or a legend. */
  read() {
    const row = this.rows?.find((row) => row.key === this.pointed);
    attr(this.readout, 'data-on', Boolean(row));
    if (row) {
      text(this.readout, sentence(row, this.record));
      return;
    }
    const words = [];
    if (this.rows?.some((row) => row.usual && row.kind !== 'to come')) words.push('The thin line is the median of the latest that got ready.');
    if (this.rows?.some((row) => row.early_ms > 0)) words.push('Hatched end: it may have been earlier, by another machine’s clock.');
    if (this.rows?.some((row) => row.kind === 'to come')) words.push('Dashed: what is to come, by the median.');
    if (this.rows?.some((row) => row.kind === 'cut')) words.push('Hatched bar: it was not over when the start was given up.');
    text(this.readout, words.join(' ') || 'From the first held request on. Point at a phase for its numbers.');
  }
}

function makeRow(row) {
  const name = row.depth ? partName(row.name) : phaseName(row.name);
  const swatch = h('span', { class: 'swatch', 'aria-hidden': 'true' });
  const button = h('button', { type: 'button', class: 'phase-name' }, swatch, h('span', {}, name));
  const node = h('tr', { 'data-row': row.key, 'data-depth': row.depth },
    h('th', { scope: 'row' }, button),
    h('td', { class: 'track-cell' }, h('div', { class: 'track' }, h('span', { class: 'ghost' }), h('span', { class: 'span' }), h('span', { class: 'early' }))),
    h('td', { class: 'took' }),
    h('td', { class: 'usual' }));
  style(node, '--colour', phaseColour(row.of ?? row.name));
  return node;
}

function tookInWords(row) {
  if (row.kind === 'to come') return `${duration(row.duration_ms)}`;
  if (row.kind === 'runs') return rough(row.duration_ms);
  return duration(row.duration_ms);
}

const signed = (ms) => (Math.abs(ms) < 0.05 ? '±0' : `${ms > 0 ? '+' : '−'}${duration(Math.abs(ms))}`);

function sentence(row, record) {
  const name = row.depth ? partName(row.name) : phaseName(row.name);
  const meaning = row.depth ? `part of ${phaseName(row.of)}` : phaseMeaning(row.name);
  const head = meaning ? `${name} (${meaning})` : name;
  const words = [];
  if (row.kind === 'to come') return `${head}: to come. It takes ${duration(row.duration_ms)} half of the time.`;
  if (row.kind === 'cut') words.push(`${head}: since ${duration(row.start_ms)}, given up after ${duration(row.duration_ms)}.`);
  else if (row.kind === 'runs') words.push(`${head}: runs since ${duration(row.start_ms)}, for ${rough(row.duration_ms)} so far.`);
  else words.push(`${head}: from ${duration(row.start_ms)} to ${duration(row.start_ms + row.duration_ms)}, took ${duration(row.duration_ms)}, ${share(row.duration_ms, record.total_ms)} of all.`);
  if (row.early_ms > 0) words.push(`Its end may have been up to ${duration(row.early_ms)} earlier, by another machine’s clock.`);
  if (row.usual) {
    const nine = row.usual.p90_ms === undefined ? '' : `, nine of ten ${duration(row.usual.p90_ms)} at most`;
    words.push(`Median ${duration(row.usual.median_ms)}${nine}.`);
  }
  return words.join(' ');
}
