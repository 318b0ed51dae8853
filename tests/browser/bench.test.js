// The HTML report of `bench cold-start`, opened as a file: standalone, on any screen, on paper.

import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { accessible, fits, launch } from './browser.js';

const ANTEROOM = process.env.ANTEROOM_BIN ?? fileURLToPath(new URL('../../target/debug/anteroom', import.meta.url));
const browser = await launch();
const folder = await mkdtemp(join(tmpdir(), 'anteroom-bench-'));
after(() => rm(folder, { recursive: true, force: true }));

/** Runs the benchmark, and returns the URL of its report and the results. */
async function measure(name, code, ...more) {
  const [html, json] = [join(folder, `${name}.html`), join(folder, `${name}.json`)];
  const ended = await new Promise((resolve) =>
    execFile(ANTEROOM, ['bench', 'cold-start', '--html', html, '--json', json, ...more], (error, stdout, stderr) => resolve({ code: error?.code ?? 0, stdout, stderr })),
  );
  assert.equal(ended.code, code, ended.stderr);
  return { url: pathToFileURL(html).href, run: JSON.parse(await readFile(json, 'utf8')) };
}

/** Opens a page for the duration of `use`: no script, no error, no request except for the page itself. */
async function open(url, options, use) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  const wrong = [];
  context.on('request', (request) => request.url() === url || wrong.push(`it asks for ${request.url()}`));
  page.on('pageerror', (error) => wrong.push(`it throws ${error.stack}`));
  page.on('console', (message) => wrong.push(`it logs ${message.text()}`));
  try {
    await page.goto(url);
    await use(page);
  } finally {
    await context.close();
  }
  assert.deepEqual(wrong, []);
}

const measured = await measure('cold', 0, '--cycles', '4', '--load-time', '200ms', '--idle', '50ms', '--burst', '3', '--gpu-hour-price', '2.5', '--currency', 'EUR', '--label', 'a <b>test</b>');

test('the report has every phase with its colour, and the numbers of the JSON', { timeout: 60_000 }, () =>
  open(measured.url, {}, async (page) => {
    assert.equal(await page.title(), 'Cold starts of stand-in: a <b>test</b>');
    const { phases, totals } = measured.run.summary;
    assert.ok(phases.length >= 5);
    for (const row of [...phases, ...totals]) {
      const cells = await page.locator(`tr[data-row="${row.name}"] [data-ms]`).evaluateAll((cells) => cells.map((cell) => Number(cell.dataset.ms)));
      assert.deepEqual(cells, [row.median_ms, ...row.ci_ms, row.p90_ms, row.p99_ms, row.min_ms, row.max_ms], row.name);
    }
    // Bars match the phases of the record, each in its own colour.
    const bars = await page.locator('.strips tbody tr').first().locator('rect').evaluateAll((bars) => bars.map((bar) => ({ fill: getComputedStyle(bar).fill, left: bar.getBoundingClientRect().left, width: bar.getBoundingClientRect().width })));
    const spans = measured.run.cycles[0].cold_start.phases;
    assert.equal(bars.length, spans.length);
    assert.equal(new Set(bars.map((bar) => bar.fill)).size, spans.length);
    const load = spans.findIndex((span) => span.name === 'load');
    const token = spans.findIndex((span) => span.name === 'first_token');
    const near = (one, other) => assert.ok(Math.abs(one - other) < 0.02 * other, `${one} is not near ${other}`);
    near(bars[load].width / bars[token].width, spans[load].duration_ms / spans[token].duration_ms);
    for (const [index, bar] of bars.entries()) assert.ok(bar.width >= 1 && (index === 0 || bar.left >= bars[index - 1].left), `bar ${index}`);
    assert.equal(await page.locator('.strips tbody tr').count(), 4);
    // Each cycle can be opened with a click or a key.
    const first = page.locator('details').first();
    await first.locator('summary').focus();
    await page.keyboard.press('Enter');
    assert.equal(await first.locator('table').count(), 2);
    assert.ok(await first.locator('table').first().isVisible());
  }));

for (const colorScheme of ['light', 'dark']) {
  test(`the report can be read by everybody, ${colorScheme}`, { timeout: 60_000 }, () =>
    open(measured.url, { colorScheme }, async (page) => {
      const background = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
      assert.equal(background, colorScheme === 'light' ? 'rgb(250, 248, 245)' : 'rgb(20, 19, 17)');
      await page.locator('details').first().locator('summary').click();
      await fits(page);
      await accessible(page, 60);
    }));
}

test('the report can be read on a phone', { timeout: 60_000 }, () =>
  open(measured.url, { viewport: { width: 390, height: 844 } }, async (page) => {
    // Wide tables scroll within their panels.
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    assert.ok(wide <= 0, `${wide} pixels too wide`);
  }));

test('the report prints on A4', { timeout: 60_000 }, () =>
  open(measured.url, { colorScheme: 'dark' }, async (page) => {
    const pdf = (await page.pdf({ preferCSSPageSize: true })).toString('latin1');
    const boxes = [...pdf.matchAll(/\/MediaBox \[([\d. ]+)\]/g)].map((match) => match[1].split(' ').map((side) => Math.round(Number(side))));
    assert.ok(boxes.length >= 2 && boxes.length <= 5, `${boxes.length} pages`);
    // 210 by 297 mm in points.
    for (const box of boxes) assert.ok(Math.abs(box[2] - 595) <= 1 && Math.abs(box[3] - 842) <= 1, box.join());
    // The width of the paper between its margins: 184 mm at 96 dpi.
    await page.setViewportSize({ width: 695, height: 1000 });
    await page.emulateMedia({ media: 'print' });
    await fits(page);
    assert.equal(await page.evaluate(() => getComputedStyle(document.body).color), 'rgb(29, 27, 24)', 'dark ink, also where screens are dark');
  }));

test('what failed is told', { timeout: 60_000 }, async () => {
  const config = join(folder, 'broken.json');
  const command = [ANTEROOM, 'sim', '--port={port}', '--load-time=100ms', '--fail-load=3'];
  await writeFile(config, JSON.stringify({ routes: [{ name: 'broken', target: { process: { command } } }] }));
  const { url, run } = await measure('broken', 1, '--cycles', '1', '--config', config);
  await open(url, {}, async (page) => {
    assert.match(await page.locator('.notice').first().innerText(), /cycle 1 failed, does not count/);
    assert.equal(await page.locator('#numbers').count(), 0);
    await page.locator('details summary').click();
    assert.ok((await page.locator('details pre').innerText()).includes(run.cycles[0].cold_start.last_lines.at(-1)));
    await accessible(page, 20);
  });
});
