// Starts `anteroom serve`, waits for its log messages, and checks that it accounts for every request and leaves nothing
// behind. Mirrors ../python/harness.py, which has more explanations.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { setTimeout as sleep } from 'node:timers/promises';

const ROOT = fileURLToPath(new URL('../../..', import.meta.url));
export const BINARY = process.env.ANTEROOM_BIN ?? join(ROOT, 'target/debug/anteroom');
// In milliseconds. Only limits the duration of a hanging test.
const PATIENCE = Number(process.env.ANTEROOM_TEST_PATIENCE ?? 120) * 1000;
const MARK = 'ANTEROOM_TEST_RUN';

export class Anteroom {
  static async start(...routes) {
    const proxy = new Anteroom();
    proxy.folder = await mkdtemp(join(tmpdir(), 'anteroom-'));
    const config = { listen: '127.0.0.1:0', admin: '127.0.0.1:0', drainDelay: '0s', log: 'json', routes };
    const path = join(proxy.folder, 'anteroom.yaml');
    await writeFile(path, JSON.stringify(config)); // JSON is valid YAML.
    proxy.mark = randomUUID();
    proxy.lines = [];
    proxy.process = spawn(BINARY, ['serve', '--config', path], {
      env: { ...process.env, [MARK]: proxy.mark },
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    proxy.ended = once(proxy.process, 'close');
    const lines = createInterface({ input: proxy.process.stderr });
    lines.on('line', (line) => proxy.lines.push(line));
    const said = await eventually(() => {
      assert.equal(proxy.process.exitCode, null, proxy.lines.join('\n'));
      return proxy.events('listening')[0];
    });
    proxy.url = `http://${said.address}`;
    proxy.baseURL = `${proxy.url}/v1`;
    proxy.admin = `http://${said.admin}`;
    return proxy;
  }

  events(message) {
    return this.lines.flatMap((line) => {
      try {
        const event = JSON.parse(line);
        return event.message === message ? [event] : [];
      } catch {
        return [];
      }
    });
  }

  /** Number of model server starts. */
  get starts() {
    return this.events('starting').length;
  }

  async route() {
    const answer = await fetch(`${this.admin}/api/v1/routes`);
    return (await answer.json()).routes[0];
  }

  waitFor(fits) {
    return eventually(async () => {
      const route = await this.route();
      return fits(route) && route;
    });
  }

  /** Returns the ids of its descendants that are still running. */
  async family() {
    const found = [];
    for (const pid of await readdir('/proc')) {
      if (!/^\d+$/.test(pid) || Number(pid) === this.process.pid) continue;
      const environment = await readFile(`/proc/${pid}/environ`, 'utf8').catch(() => '');
      if (environment.split('\0').includes(`${MARK}=${this.mark}`)) found.push(pid);
    }
    return found;
  }

  /** Stops the proxy like an operator and checks its account. Returns the number of requests by outcome. */
  async stop() {
    if (this.outcomes) return this.outcomes;
    this.process.kill('SIGTERM');
    const late = setTimeout(() => this.process.kill('SIGKILL'), PATIENCE);
    const [code, signal] = await this.ended;
    clearTimeout(late);
    const log = this.lines.join('\n');
    assert.deepEqual([code, signal], [0, null], log);
    assert.ok(!log.includes('panicked'), log);
    const account = this.events('stopped').at(-1);
    assert.equal(JSON.parse(this.lines.at(-1)).message, 'stopped', log);
    assert.deepEqual([account.held, account.in_flight], [0, 0]);
    const counts = [...account.outcomes.matchAll(/(\w+)=(\d+)/g)].map(([, name, count]) => [name, Number(count)]);
    assert.equal(account.admitted, counts.reduce((sum, [, count]) => sum + count, 0));
    assert.deepEqual(await this.family(), []);
    await rm(this.folder, { recursive: true });
    this.outcomes = Object.fromEntries(counts.filter(([, count]) => count > 0));
    return this.outcomes;
  }
}

/** Returns the first truthy result of `look()`. */
export async function eventually(look) {
  const deadline = Date.now() + PATIENCE;
  for (;;) {
    const found = await look();
    if (found) return found;
    assert.ok(Date.now() < deadline, 'it did not come to that');
    await sleep(20);
  }
}

/** Returns a route with `anteroom sim` as its target, and with early heartbeats. */
export function simRoute(flags = [], policies = {}) {
  return {
    name: 'tiny',
    match: { models: ['tiny'] },
    target: { process: { command: [BINARY, 'sim', '--port', '{port}', ...flags], idleTimeout: '1h', stopTimeout: '10s' } },
    readiness: { interval: '50ms' },
    keepalive: { mode: 'comment', after: '100ms', interval: '100ms' },
    ...policies,
  };
}
