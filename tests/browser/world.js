// Routes and cold starts of every kind, for a scripted server.

import { estimates, record, route, snapshot } from './stage.js';

const ago = (ms) => new Date(Date.now() - ms).toISOString();

const inCluster = (id, factor, more) =>
  record(id, 'prod/llama-3.3-70b', { signal: 12, scale: 640 * factor, create: 180, schedule: 41_000 * factor, pull: 58_000 * factor, start: 2100, load: 96_000 * factor, propagate: 420, dispatch: 3, first_byte: 310, first_token: 95 }, more);
const ofProcess = (id, factor, more) => record(id, 'qwen3-8b', { signal: 1, start: 21, load: 3000 * factor, dispatch: 0.2, first_byte: 52, first_token: 210 }, more);

/** Turns a record into an unfinished one, in its last phase. */
function unfinished(record, more) {
  record.phases.at(-1).unfinished = true;
  for (const total of ['t_actuation_ms', 't_first_token_ms', 't_e2e_ms']) delete record[total];
  const all = { ...record, ...more };
  if (more.outcome === null) delete all.outcome;
  return all;
}

/** Failed requests, as sent by the server. */
export const failures = () => [
  {
    request_id: '01J9ZQ3/7', route: 'gemma-27b', method: 'POST', path: '/v1/chat/completions', arrived_at: ago(300_000), admitted: true, outcome: 'cold_start_failed', status: 503,
    reason: 'the command exited with code 1 while loading', total_ms: 8221,
    events: [{ at_ms: 0, event: 'arrived' }, { at_ms: 0.2, event: 'held', position: 1, why: 'nothing_ready' }, { at_ms: 1000, event: 'early_answer' }, { at_ms: 8221, event: 'ended', outcome: 'cold_start_failed', status: 503 }],
  },
  { request_id: '01J9ZQ4', route: 'prod/llama-3.3-70b', arrived_at: ago(900_000), admitted: false, outcome: 'saturated', status: 429, total_ms: 0.1, events: [{ at_ms: 0, event: 'arrived' }, { at_ms: 0.1, event: 'ended', outcome: 'saturated', status: 429 }] },
];

/** Returns a snapshot with all kinds of routes and cold starts. */
export function everything() {
  const llama = [1.1, 0.92, 1, 1.25].map((factor, index) => inCluster(80 + 2 * index, factor));
  const latest = inCluster(90, 1.08, { pod: 'prod/llama-3-3-70b-6c9f7-xk2vd', node: 'gpu-pool-a-3', request_id: 'req-01J9ZQ3', trace_id: '4bf92f3577b34da6a3ce929d0e0e4736', held_peak: 23, released: 21, left: 2 });
  const phase = (name) => latest.phases.find((phase) => phase.name === name);
  const parts = (name, ...parts) => (phase(name).parts = parts.map(([part, from, took]) => ({ name: part, start_ms: phase(name).start_ms + from, duration_ms: took })));
  parts('schedule', ['node_create', 2000, 21_000], ['node_ready', 23_000, 19_000]);
  parts('load', ['engine_start', 1000, 9000], ['weights', 10_200, 51_000], ['compile', 61_300, 24_000], ['warmup', 85_400, 14_000]);
  phase('pull').early_ms = 7000;
  phase('start').early_ms = 900;
  const qwen = [1, 1.1, 0.9].map((factor, index) => ofProcess(81 + 2 * index, factor));
  const reason = 'the command exited with code 1 while loading; its last line: torch.OutOfMemoryError: CUDA out of memory.';
  const failed = unfinished(record(89, 'gemma-27b', { signal: 1, start: 20, load: 8200 }), { outcome: 'failed', held_peak: 3, released: 0, failed: 3, reason, last_lines: ['INFO Starting to load model', `ERROR ${reason}`] });
  const abandoned = record(88, 'qwen3-8b', { signal: 1, start: 22, load: 3100 }, { outcome: 'abandoned', released: 0, left: 8 });
  const running = unfinished(record(91, 'qwen3-8b', { signal: 1, start: 21, load: 1200 }), { outcome: null, released: 0, held_peak: 12, started_at: ago(1222) });
  const stuck = unfinished(record(87, 'prod/mixtral-8x22b', { signal: 9, scale: 700, create: 120, schedule: 92_000 }), { outcome: null, released: 0, held_peak: 2, started_at: ago(93_000) });
  const routes = [
    route('qwen3-8b', { state: 'starting', held: 12, oldest_held_ms: 1222, phase: 'load', time_left_ms: 1800, cold_start: running, estimates: estimates(qwen), endpoints: [{ address: '127.0.0.1:41233', ready: false, in_flight: 0, limit: 64 }] }),
    route('prod/llama-3.3-70b', { state: 'ready', in_flight: 37, estimates: estimates([...llama, latest]), endpoints: [{ address: '10.2.0.14:8000', ready: true, in_flight: 21, limit: 64 }, { address: '10.2.3.9:8000', ready: true, in_flight: 16, limit: 64 }] }),
    route('gemma-27b', { state: 'failed', reason }),
    route('prod/mixtral-8x22b', { state: 'starting', held: 2, oldest_held_ms: 93_000, phase: 'schedule', cold_start: stuck, obstacle: { kind: 'unschedulable', message: '0/7 nodes are available: 7 Insufficient nvidia.com/gpu. Add a node with a free GPU, or lower what the pod asks for.', since: ago(80_000) } }),
    route('bge-m3'),
    route('a-name-that-is-as-long-as-names-of-models-in-a-cluster-are/qwen3-coder-480b-a35b-instruct-fp8', { state: 'stopping' }),
    route('phi-4', { state: 'sleeping' }),
  ];
  const wave = (of) => Array.from({ length: 120 }, (_, second) => Math.max(0, Math.round(of(second))));
  const held = { 'qwen3-8b': wave((second) => (second - 112) * 1.6), 'prod/mixtral-8x22b': wave((second) => (second > 28 ? 2 : 0)) };
  const coldStarts = [latest, failed, abandoned, ...llama, ...qwen].sort((a, b) => b.id - a.id);
  const told = snapshot(routes, coldStarts, held);
  told.about.peers = { connected: 1, silent: 0 };
  return told;
}
