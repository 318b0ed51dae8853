// The dashboard of a running proxy, with `anteroom sim` as the model server.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Anteroom, eventually, simRoute } from '../clients/node/harness.js';
import { accessible, fits, launch, withPage } from './browser.js';

const browser = await launch();

/** Defines a test with the dashboard of a proxy with these routes. */
function withProxy(name, routes, use, expected) {
  test(name, { timeout: 180_000 }, async () => {
    const proxy = await Anteroom.start(...routes);
    try {
      await withPage(browser, `${proxy.admin}/`, {}, (page) => use(page, proxy), expected);
      await proxy.stop();
    } catch (error) {
      console.error(proxy.lines.join('\n'));
      throw error;
    } finally {
      proxy.process.kill('SIGKILL');
    }
  });
}

const ask = (proxy, model, signal) =>
  fetch(`${proxy.baseURL}/chat/completions`, { method: 'POST', signal, headers: { 'content-type': 'application/json' }, body: JSON.stringify({ model, stream: true, messages: [{ role: 'user', content: 'Who is at the door?' }] }) }).then(async (answer) => [answer.status, await answer.text()]);

/** Collects the distinct consecutive texts of a node from now on. */
const sayings = (page, selector) =>
  page.evaluateHandle((selector) => {
    const said = [];
    const look = () => {
      const text = document.querySelector(selector)?.textContent;
      if (text !== undefined && text !== said.at(-1)) said.push(text);
    };
    look();
    new MutationObserver(look).observe(document.body, { childList: true, characterData: true, subtree: true });
    return said;
  }, selector);

const another = { ...simRoute(), name: 'unused', match: { models: ['unused'] } };
withProxy('a cold start from the first request to the first token, as it happens', [simRoute(['--load-time', '2500ms', '--time-to-first-token', '300ms', '--tokens', '30', '--inter-token-time', '40ms']), another], async (page, proxy) => {
  await page.getByText('No cold start yet').waitFor();
  assert.match(await page.locator('#no-starts').innerText(), new RegExp(`${new URL(proxy.url).port}/v1/chat/completions[^]*"model":"tiny"`));
  const states = await sayings(page, '.card .state-word');
  const held = await sayings(page, '.card .card-figures .number');
  const phases = await sayings(page, '#spot .totals .label');
  const answers = Promise.all([ask(proxy, 'tiny'), ask(proxy, 'tiny'), ask(proxy, 'tiny')]);
  await page.locator('tr[data-row="load"][data-kind="runs"]').waitFor();
  // The bar grows during the load.
  const width = () => page.locator('tr[data-row="load"] .took').innerText();
  const before = await width();
  await eventually(async () => (await width()) !== before);
  await accessible(page);
  await page.locator('#spot .state-word', { hasText: 'completed' }).waitFor();
  assert.deepEqual((await answers).map(([status]) => status), [200, 200, 200]);
  await page.locator('.card .number').nth(1).getByText('0', { exact: true }).waitFor();

  assert.deepEqual((await states.jsonValue()).slice(0, 3), ['idle', 'starting', 'ready']);
  const counts = (await held.jsonValue()).map(Number);
  assert.deepEqual([counts[0], Math.max(...counts), counts.at(-1)], [0, 3, 0]);
  const seen = (await phases.jsonValue()).filter((label) => label.startsWith('now: ')).map((label) => label.slice(5));
  assert.ok(seen.includes('load') && seen.includes('first token'), seen.join());
  assert.deepEqual(seen, [...seen].sort((a, b) => order(a) - order(b)), 'one after the other');

  const [record] = (await (await fetch(`${proxy.admin}/api/v1/cold-starts`)).json()).cold_starts;
  const names = record.phases.map((phase) => phase.name.replaceAll('_', ' '));
  assert.deepEqual(await page.locator('.waterfall tbody tr[data-depth="0"] th').allInnerTexts(), names);
  assert.ok(names.includes('load') && names.includes('first token'), names.join());
  const totals = await page.locator('.totals').innerText();
  for (const total of ['T_actuation', 'T_first_token', 'T_e2e']) assert.match(totals, new RegExp(total));
  assert.match(totals, /held\s+3\s+3 served/);
  assert.match(await page.locator('.card').first().getByRole('img').getAttribute('aria-label'), /at most 3 requests/);
  assert.equal(await page.locator('#past-list li').count(), 1);
  await fits(page);
  await accessible(page);

  // A page opened later shows the same.
  await page.reload();
  await page.locator('#spot .state-word', { hasText: 'completed' }).waitFor();
  assert.match(await page.locator('.card').first().getByRole('img').getAttribute('aria-label'), /at most 3 requests/);
});

const ORDER = ['signal', 'start', 'load', 'propagate', 'dispatch', 'first byte', 'first token'];
const order = (name) => ORDER.indexOf(name);

withProxy('a start that fails: why, its last lines, and the requests that it failed', [simRoute(['--load-time', '600ms', '--fail-load=3'])], async (page, proxy) => {
  const [status] = await ask(proxy, 'tiny').then(([status, text]) => [text.includes('cold_start_failed') ? 'failed' : status]);
  assert.equal(status, 'failed');
  await page.locator('#spot .state-word', { hasText: 'failed' }).waitFor();
  assert.match(await page.locator('#spot .message').innerText(), /exited with code 3/);
  await page.locator('#spot').getByText('Its last lines').click();
  assert.match(await page.locator('#spot pre').innerText(), /CUDA out of memory/);
  const failures = page.locator('#failed-list details');
  await failures.first().waitFor();
  assert.match(await failures.first().innerText(), /tiny\s+.*the start failed/);
  await failures.first().locator('summary').click();
  assert.match(await failures.first().innerText(), /held, at place 1[^]*ended: the start failed/);
  await page.locator('#failed-list a').first().click();
  await eventually(async () => page.url().includes('/api/v1/requests/'));
  await page.locator('body', { hasText: 'cold_start_failed' }).waitFor();
}, [/favicon/]);

withProxy('draining, and the end', [simRoute(['--tokens', '100000', '--inter-token-time', '10ms'])], async (page, proxy) => {
  const hangUp = new AbortController();
  const answer = ask(proxy, 'tiny', hangUp.signal).catch(() => 'hung up');
  await page.locator('.card .state-word', { hasText: 'ready' }).waitFor();
  await proxy.waitFor((route) => route.in_flight === 1);
  proxy.process.kill('SIGTERM');
  await page.getByText(/Draining: this replica is shutting down/).waitFor();
  await page.getByText('live', { exact: true }).waitFor();
  hangUp.abort();
  assert.equal(await answer, 'hung up');
  await page.getByText(/Connection lost: /).waitFor();
}, [/ERR_CONNECTION|ERR_INCOMPLETE|ERR_EMPTY/]);
