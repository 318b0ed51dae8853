// Chromium, and the rules for every page in it: no errors in the console, no requests to other origins.

import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after } from 'node:test';
import { chromium } from 'playwright-core';

const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');

// The last flags prevent requests to the browser's vendor at every start.
export const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'];

/** Launches a Chromium for all tests of a file, closed after them. */
export async function launch() {
  const folder = await mkdtemp(join(tmpdir(), 'anteroom-browser-'));
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: FLAGS, env: { ...process.env, HOME: folder } });
  after(async () => {
    await browser.close();
    await rm(folder, { recursive: true, force: true });
  });
  return browser;
}

/** Opens the page at `url` for the duration of `use`. Only console messages that match `expected` are allowed. */
export async function withPage(browser, url, options, use, expected = []) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  const wrong = [];
  const { origin } = new URL(url);
  context.on('request', (request) => {
    if (new URL(request.url()).origin !== origin) wrong.push(`it asks for ${request.url()}`);
  });
  page.on('pageerror', (error) => wrong.push(`it throws ${error.stack}`));
  page.on('console', (message) => {
    const text = `${message.text()} (${message.location().url})`;
    if (['error', 'warning'].includes(message.type()) && !expected.some((known) => known.test(text))) wrong.push(`it logs ${text}`);
  });
  try {
    await page.goto(url);
    await page.locator('[data-link="live"]').waitFor();
    await use(page);
  } finally {
    await context.close();
  }
  assert.deepEqual(wrong, []);
}

/** Asserts that axe finds no violations in the current page, and that it measured at least `least` contrasts. */
export async function accessible(page, least = 20) {
  await page.evaluate(AXE);
  const { violations, passes, incomplete } = await page.evaluate(() => axe.run(document, { resultTypes: ['violations', 'passes', 'incomplete'] }));
  const told = violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map((node) => `${node.html} ${node.failureSummary}`).join('\n  ')}`);
  assert.deepEqual(told, []);
  const measured = passes.find((rule) => rule.id === 'color-contrast')?.nodes.length ?? 0;
  assert.ok(measured >= least, `${measured} contrasts were measured`);
  const unsure = incomplete.filter((rule) => rule.id === 'color-contrast').flatMap((rule) => rule.nodes.map((node) => node.html));
  assert.deepEqual(unsure, [], 'contrasts that cannot be told');
}

/** Asserts that nothing is wider than the window. */
export async function fits(page) {
  const wide = await page.evaluate(() => {
    const { clientWidth } = document.documentElement;
    const out = [...document.querySelectorAll('body *')].filter((node) => node.getBoundingClientRect().right > clientWidth + 0.5 && !node.closest('pre, .hidden, .skip, .ellipsis'));
    return { scroll: Math.max(0, document.documentElement.scrollWidth - clientWidth), out: out.map((node) => node.outerHTML.slice(0, 120)) };
  });
  assert.deepEqual(wide, { scroll: 0, out: [] });
}
