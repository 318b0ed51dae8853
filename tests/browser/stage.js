// A scripted server for the dashboard, for situations that cannot be created quickly with a real one: clusters,
// different clocks, hundreds of routes, malicious names.

import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { once } from 'node:events';
import { extname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ASSETS = fileURLToPath(new URL('../../src/admin/dashboard/', import.meta.url));
const TYPES = { '.html': 'text/html', '.css': 'text/css', '.js': 'text/javascript', '.svg': 'image/svg+xml' };
// Same as in src/admin/dashboard.rs.
const POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

export class Stage {
  /** Serves `snapshot` first; `requests` are the failed requests. */
  static async open(snapshot, requests = []) {
    const stage = new Stage();
    stage.snapshot = snapshot;
    stage.requests = requests;
    stage.followers = new Set();
    stage.server = createServer((request, response) => stage.answer(request, response));
    stage.server.listen(0, '127.0.0.1');
    await once(stage.server, 'listening');
    stage.url = `http://127.0.0.1:${stage.server.address().port}/`;
    return stage;
  }

  async answer(request, response) {
    const { pathname } = new URL(request.url, this.url);
    if (pathname === '/api/v1/events') {
      if (this.refusal) {
        response.writeHead(503, { 'content-type': 'application/json' }).end(JSON.stringify({ error: this.refusal }));
        return;
      }
      response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
      this.followers.add(response);
      response.on('close', () => this.followers.delete(response));
      response.write(event('snapshot', this.snapshot));
      return;
    }
    if (pathname === '/api/v1/requests') {
      response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify({ requests: this.requests }));
      return;
    }
    const name = pathname === '/' ? 'index.html' : pathname.match(/^\/dashboard\/([\w.]+)$/)?.[1];
    const content = name && (await readFile(join(ASSETS, name)).catch(() => null));
    if (!content) {
      response.writeHead(404).end();
      return;
    }
    response.writeHead(200, { 'content-type': TYPES[extname(name)], 'content-security-policy': POLICY }).end(content);
  }

  /** Sends an update. */
  tell(update) {
    this.snapshot.about = { ...this.snapshot.about, tick: this.snapshot.about.tick + 1, uptime_ms: this.snapshot.about.uptime_ms + 1000, now_ms: Date.now(), ...update.about };
    const whole = { routes: [], cold_starts: [], held: {}, ...update, about: this.snapshot.about };
    for (const follower of this.followers) follower.write(event('update', whole));
  }

  /** Closes all connections; new ones are rejected with `refusal`, if given. */
  cut(refusal) {
    this.refusal = refusal;
    for (const follower of this.followers) follower.destroy();
  }

  async close() {
    this.server.closeAllConnections();
    this.server.close();
    await once(this.server, 'close');
  }
}

const event = (name, data) => `event: ${name}\ndata: ${JSON.stringify(data)}\n\n`;

/** Returns a snapshot of these routes and cold starts. */
export function snapshot(routes, coldStarts = [], held = {}) {
  const about = { version: '0.1.0', instance: 'anteroom-7d9f', uptime_ms: 5_040_000, now_ms: Date.now(), port: 8080, model: 'tiny', draining: false, awaits_routes: false, tick: 200, peers: {} };
  return { about, names: routes.map((route) => route.name), routes, cold_starts: coldStarts, held };
}

/** Returns an idle route, with the fields of `more`. */
export function route(name, more = {}) {
  const limits = { hold_max_requests: 1000, hold_max_bytes: 67108864, hold_timeout_ms: 900_000, concurrency_max: 64 };
  return { name, state: 'idle', held: 0, held_bytes: 0, in_flight: 0, endpoints: [], limits, ...more };
}

/** Returns a record with consecutive phases of these durations, in milliseconds. */
export function record(id, name, durations, more = {}) {
  let at = 0;
  const phases = Object.entries(durations).map(([name, duration]) => {
    const phase = { name, start_ms: at, duration_ms: duration };
    at += duration;
    return phase;
  });
  const end = (name) => phases.filter((phase) => phase.name === name).map((phase) => phase.start_ms + phase.duration_ms)[0];
  const ready = end('propagate') ?? end('load');
  const token = end('first_token');
  return {
    id, route: name, kind: 'cold_start', outcome: 'completed', started_at: new Date(Date.now() - 60_000 * (100 - id)).toISOString(), total_ms: at, phases,
    ...(ready && { t_actuation_ms: ready }), ...(token && { t_first_token_ms: token - ready, t_e2e_ms: token }),
    held_peak: 8, released: 8, failed: 0, left: 0, ...more,
  };
}

/** Returns the estimates for the next cold start from these records. */
export function estimates(records) {
  const of = (values) => {
    const sorted = [...values].sort((a, b) => a - b);
    const rank = (share) => sorted[Math.max(1, Math.ceil(share * sorted.length)) - 1];
    return { median_ms: rank(0.5), p90_ms: rank(0.9) };
  };
  const names = [...new Set(records.flatMap((record) => record.phases.map((phase) => phase.name)))];
  const phases = names.map((name) => ({ name, ...of(records.flatMap((record) => record.phases.filter((phase) => phase.name === name).map((phase) => phase.duration_ms))) }));
  return { count: records.length, until_ready: of(records.map((record) => record.t_actuation_ms)), phases };
}
