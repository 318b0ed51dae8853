// Takes the screenshots of the dashboard for the documentation, for `.ci/screenshots`: of a running proxy with
// `anteroom sim` as the model servers.
//
// Usage: node screenshots.js FOLDER

import { join } from 'node:path';
import { chromium } from 'playwright-core';
import { Anteroom, BINARY, eventually } from '../clients/node/harness.js';
import { FLAGS } from './browser.js';

const folder = process.argv[2];

/** Returns a route for a model with this load time and idle timeout. */
function route(name, loadTime, idleTimeout, more = []) {
  const command = [BINARY, 'sim', `--model=${name}`, '--port={port}', `--load-time=${loadTime}`, '--time-to-first-token=350ms', '--inter-token-time=60ms', ...more];
  return { name, match: { models: [name] }, target: { process: { command, idleTimeout, stopTimeout: '5s' } }, readiness: { interval: '50ms' } };
}

const LONG = ['--tokens=4000'];
const proxy = await Anteroom.start(
  route('qwen3-8b', '6s', '1s', ['--tokens=12']),
  route('llama-3.3-70b', '9s', '1h', LONG),
  route('gemma-3-27b', '4s', '1h', ['--fail-load']),
  route('bge-m3', '1s', '1h'),
  route('whisper-large-v3', '1s', '1h'),
);
const hangUp = new AbortController();
const ask = (model, count) =>
  Array.from({ length: count }, () =>
    fetch(`${proxy.baseURL}/chat/completions`, { method: 'POST', signal: hangUp.signal, headers: { 'content-type': 'application/json' }, body: JSON.stringify({ model, stream: true, max_tokens: model.startsWith('llama') ? 4000 : 12, messages: [{ role: 'user', content: 'Who is at the door?' }] }) })
      .then((answer) => answer.text())
      .catch(() => ''));
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const state = async (name) => (await (await fetch(`${proxy.admin}/api/v1/routes`)).json()).routes.find((route) => route.name === name).state;

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: FLAGS });
async function picture(name, { width, height, colorScheme, choose, from }) {
  const context = await browser.newContext({ viewport: { width, height }, deviceScaleFactor: 2, colorScheme, reducedMotion: 'reduce' });
  const page = await context.newPage();
  await page.goto(`${proxy.admin}/`);
  await page.locator('[data-link="live"]').waitFor();
  await page.evaluate(() => document.fonts.ready);
  if (choose) await page.locator('#past-list button', { hasText: choose }).first().click();
  if (from) await page.locator(from).evaluate((node) => node.scrollIntoView());
  await page.mouse.move(0, 0);
  await page.evaluate(() => document.activeElement?.blur());
  await pause(300);
  await page.screenshot({ path: join(folder, `${name}.png`) });
  await context.close();
}

try {
  const streams = ask('llama-3.3-70b', 14);
  for (let round = 0; round < 4; round += 1) {
    for (const burst of [3, 2, 1 + round]) {
      streams.push(...ask('qwen3-8b', burst));
      await pause(700);
    }
    if (round === 2) streams.push(...ask('gemma-3-27b', 2));
    await eventually(async () => (await state('qwen3-8b')) === 'idle');
  }
  await picture('dashboard-light', { width: 1240, height: 1010, colorScheme: 'light', choose: 'qwen3-8b' });
  for (const burst of [2, 3, 1, 4]) {
    streams.push(...ask('qwen3-8b', burst));
    await pause(900);
  }
  await picture('dashboard-dark', { width: 1240, height: 1010, colorScheme: 'dark' });
  await eventually(async () => (await state('qwen3-8b')) === 'ready');
  await pause(1000);
  await picture('dashboard-phone', { width: 390, height: 844, colorScheme: 'dark', from: '.starts' });
  hangUp.abort();
  await Promise.all(streams);
  await proxy.stop();
} finally {
  proxy.process.kill('SIGKILL');
  await browser.close();
}
