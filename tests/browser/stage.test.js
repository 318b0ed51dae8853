// The dashboard with a scripted server: content, accessibility and updates.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { accessible, fits, launch, withPage } from './browser.js';
import { Stage, record, route, snapshot } from './stage.js';
import { everything, failures } from './world.js';

const browser = await launch();

/** Defines a test with a page whose server sends the snapshot `told()` first. */
function withStage(name, told, use, { expected, ...options } = {}) {
  test(name, { timeout: 120_000 }, async () => {
    const stage = await Stage.open(told(), told === everything ? failures() : []);
    try {
      await withPage(browser, stage.url, options, (page) => use(page, stage), expected);
    } finally {
      await stage.close();
    }
  });
}

const card = (page, name) => page.locator('.card').filter({ has: page.getByRole('heading', { name, exact: true }) });
const past = (page, text) => page.locator('#past-list button').filter({ hasText: text }).first();
const phase = (page, name) => page.getByRole('row').filter({ has: page.getByRole('button', { name, exact: true }) });

for (const colorScheme of ['light', 'dark']) {
  for (const [size, viewport] of Object.entries({ wide: { width: 1280, height: 900 }, phone: { width: 360, height: 740 } })) {
    withStage(`accessible and within the window: ${colorScheme}, ${size}`, everything, async (page) => {
      await card(page, 'qwen3-8b').waitFor();
      await page.locator('#failed-list li').first().waitFor();
      for (const summary of await page.locator(':is(.card, .failures) summary:visible').all()) await summary.click();
      await fits(page);
      await accessible(page);
      for (const name of ['gemma-27b', 'prod/llama-3.3-70b']) {
        await past(page, name).click();
        await page.locator('#spot-title', { hasText: name }).waitFor();
        await fits(page);
        await accessible(page);
      }
      await page.locator('.lines summary').waitFor({ state: 'hidden' });
    }, { colorScheme, viewport });
  }
}

withStage('every route with its state in words, and what keeps it', everything, async (page) => {
  const words = { 'qwen3-8b': 'starting', 'prod/llama-3.3-70b': 'ready', 'gemma-27b': 'failed', 'bge-m3': 'idle', 'phi-4': 'sleeping' };
  for (const [name, word] of Object.entries(words)) {
    await card(page, name).getByText(word, { exact: true }).waitFor();
    // The state is also shown by an icon, in addition to word and colour.
    assert.equal(await card(page, name).locator(`.card-head .icon-${word}`).count(), 1);
  }
  const qwen = card(page, 'qwen3-8b');
  assert.match(await qwen.innerText(), /12\s+held[^]*oldest 1\.\d s[^]*load · 1\.\d s[^]*about \d s left|any moment/);
  const bar = qwen.getByRole('progressbar');
  assert.ok(Number(await bar.getAttribute('aria-valuenow')) >= 40);
  assert.match(await qwen.getByRole('img').getAttribute('aria-label'), /at most 11 requests/);
  const mixtral = await card(page, 'prod/mixtral-8x22b').innerText();
  assert.match(mixtral, /No node accepts the pod since [^]*Add a node with a free GPU/);
  assert.match(mixtral, /no estimate yet/);
  assert.match(await card(page, 'gemma-27b').innerText(), /Could not be started[^]*CUDA out of memory/);
  await card(page, 'prod/llama-3.3-70b').getByText('2 of 2 endpoints ready').click();
  // The content is created when it is opened.
  await card(page, 'prod/llama-3.3-70b').getByText('10.2.0.14:8000').waitFor();
  assert.match(await card(page, 'prod/llama-3.3-70b').innerText(), /10\.2\.0\.14:8000\s+ready\s+21 of 64 in flight/);
  assert.equal(await page.locator('#sum-held').innerText(), '14');
  assert.equal(await page.title(), '14 held · Anteroom');
});

withStage('a cold start as a waterfall against the median', everything, async (page) => {
  await page.locator('#spot-title', { hasText: 'qwen3-8b' }).waitFor();
  assert.equal(await phase(page, 'load').getAttribute('data-kind'), 'runs');
  assert.equal(await phase(page, 'first token').getAttribute('data-kind'), 'to come');
  await past(page, 'prod/llama-3.3-70b').click();
  assert.match(await page.locator('.totals').innerText(), /T_actuation\s+214\.\d s[^]*T_first_token[^]*T_e2e[^]*held\s+23\s+21 served, 2 left/);
  const names = await page.locator('.waterfall tbody tr th').allInnerTexts();
  assert.deepEqual(names, ['signal', 'scale', 'create', 'schedule', 'node created', 'node ready', 'pull', 'start', 'load', 'engine start', 'weights', 'compilation', 'warm-up', 'propagate', 'dispatch', 'first byte', 'first token']);
  // The bars have the positions from the record.
  const track = await phase(page, 'load').locator('.track').boundingBox();
  const bar = await phase(page, 'load').locator('.span').boundingBox();
  const chosen = everything().cold_starts.find((record) => record.id === 90);
  const load = chosen.phases.find((phase) => phase.name === 'load');
  assert.ok(Math.abs(bar.x - track.x - (track.width * load.start_ms) / chosen.total_ms) < 1.5);
  assert.ok(Math.abs(bar.width - (track.width * load.duration_ms) / chosen.total_ms) < 1.5);
  await phase(page, 'pull').hover();
  const readout = page.locator('.readout');
  assert.match(await readout.innerText(), /pull \(until its images are on the node\): from .* took 62\.6 s, 29 % of all\. Its end may have been up to 7\.00 s earlier, by another machine’s clock\. Median 62\.6 s, nine of ten 72\.5 s at most\./);
  assert.ok(await phase(page, 'pull').locator('.early').isVisible());
  assert.ok(!(await phase(page, 'load').locator('.early').isVisible()));
  await past(page, 'gemma-27b').click();
  await page.getByText('Its last lines').click();
  assert.match(await page.locator('.lines pre').innerText(), /Starting to load model\nERROR/);
  assert.equal(await phase(page, 'load').getAttribute('data-kind'), 'cut');
  await page.getByRole('button', { name: 'Follow the latest' }).click();
  await page.locator('#spot-title', { hasText: 'qwen3-8b' }).waitFor();
});

withStage('all of it by keyboard', everything, async (page) => {
  await page.keyboard.press('Tab');
  assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Skip to the routes');
  await page.keyboard.press('Enter');
  assert.equal(await page.evaluate(() => document.activeElement.id), 'routes');
  await page.keyboard.press('/');
  await page.keyboard.type('llama');
  assert.deepEqual(await page.locator('.card h3').allInnerTexts(), ['prod/llama-3.3-70b']);
  await page.keyboard.press('Escape');
  assert.equal(await page.locator('.card').count(), 7);
  // Every control can be reached by keyboard, and shows its focus.
  const reached = new Set();
  for (let step = 0; step < 120; step += 1) {
    await page.keyboard.press('Tab');
    const here = await page.evaluate(() => {
      const node = document.activeElement;
      const { outlineStyle, outlineWidth } = getComputedStyle(node);
      node.dataset.reached = 'yes';
      return { html: node.outerHTML.slice(0, 80), seen: node === document.body || (outlineStyle !== 'none' && parseFloat(outlineWidth) >= 1) };
    });
    assert.ok(here.seen, `no outline: ${here.html}`);
    reached.add(here.html);
  }
  const missed = await page.evaluate(() => [...document.querySelectorAll('a, button, select, input, summary')].filter((node) => node.checkVisibility() && !node.dataset.reached).map((node) => node.outerHTML.slice(0, 80)));
  assert.deepEqual(missed, []);
  await page.getByRole('button', { name: 'load', exact: true }).focus();
  assert.match(await page.locator('.readout').innerText(), /^load \(until its readiness probe succeeds\)/);
  await past(page, 'gemma-27b').focus();
  await page.keyboard.press('Enter');
  await page.locator('#spot-title', { hasText: 'gemma-27b' }).waitFor();
});

withStage('what is told anew takes the focus from nobody', everything, async (page, stage) => {
  await past(page, 'gemma-27b').focus();
  await card(page, 'bge-m3').waitFor();
  const { routes, names } = stage.snapshot;
  stage.tell({ routes: [route('bge-m3', { state: 'starting', held: 3 })], names: [...names].reverse() });
  await card(page, 'bge-m3').getByText('starting').waitFor();
  assert.match(await page.evaluate(() => document.activeElement.textContent), /gemma-27b/);
  assert.equal(routes.length, await page.locator('.card').count());
});

withStage('changes of state are said once, and together', everything, async (page, stage) => {
  await card(page, 'bge-m3').waitFor();
  const said = await page.evaluateHandle(() => {
    const said = [];
    new MutationObserver(() => said.push(document.getElementById('said').textContent)).observe(document.getElementById('said'), { childList: true, characterData: true, subtree: true });
    return said;
  });
  for (const state of ['starting', 'failed', 'starting', 'ready']) stage.tell({ routes: [route('bge-m3', { state })] });
  await page.locator('#said', { hasText: 'bge-m3 is ready' }).waitFor({ state: 'attached' });
  for (let tick = 0; tick < 5; tick += 1) stage.tell({});
  assert.deepEqual(await said.jsonValue(), ['bge-m3 is ready']);
});

const evil = '<img src=x onerror="document.title=1"><b>bold</b>';
const hostile = () => {
  const failed = record(3, evil, { signal: 1, load: 20 }, { outcome: 'failed', reason: evil, last_lines: [evil], pod: evil, node: evil, request_id: evil });
  const routes = [route(evil, { state: 'failed', reason: evil, obstacle: { kind: evil, message: evil, since: evil }, endpoints: [{ address: evil, ready: true, in_flight: 0, limit: 1 }] }), route('__proto__'), route('constructor')];
  const told = snapshot(routes, [failed]);
  return { ...told, about: { ...told.about, instance: evil, model: evil, peers: { [evil]: 1 } } };
};
withStage('what comes from outside is text', hostile, async (page) => {
  await page.locator('.card summary:visible').first().click();
  assert.equal(await page.locator('main img, main b, .facts img').count(), 0);
  assert.equal(await page.locator('#spot-title').innerText(), evil);
  assert.match(await page.locator('.card').first().innerText(), /<b>bold<\/b>/);
  assert.equal(await page.title(), 'Anteroom');
  for (const name of ['__proto__', 'constructor']) await card(page, name).waitFor();
  await fits(page);
}, { viewport: { width: 360, height: 740 } });

const many = () => snapshot(Array.from({ length: 250 }, (_, index) => route(`team-${index % 9}/model-${index}`, index === 200 ? { state: 'starting', held: 4 } : {})));
withStage('hundreds of routes: what happens is first, and the others are found', many, async (page) => {
  await page.locator('.card').first().waitFor();
  assert.equal(await page.locator('.card').count(), 12);
  assert.equal(await page.locator('.card h3').first().innerText(), 'team-2/model-200');
  await page.getByRole('searchbox').fill('team-4 24');
  assert.deepEqual(await page.locator('.card h3').allInnerTexts(), ['team-4/model-247', 'team-4/model-24', 'team-4/model-240'].filter((name) => name.startsWith(`team-${Number(name.split('-').at(-1)) % 9}/`)).sort());
  await page.getByRole('searchbox').fill('');
  await page.getByLabel('State').selectOption('starting');
  assert.equal(await page.locator('.card').count(), 1);
  await page.getByLabel('State').selectOption('');
  await page.getByRole('button', { name: 'Show all 250' }).click();
  assert.equal(await page.locator('.card').count(), 250);
});

withStage('a lost connection is told, and it comes back', everything, async (page, stage) => {
  await card(page, 'bge-m3').waitFor();
  stage.cut('16 are watching already, which is the maximum');
  await page.getByText(/Connection lost: /).waitFor();
  await page.getByText(/Connection lost: 16 are watching already.*as it was at \d/).waitFor();
  assert.equal(await page.getByRole('status').innerText(), 'connection lost');
  await accessible(page);
  stage.refusal = null;
  stage.snapshot.about.instance = 'another-one';
  await page.locator('#instance', { hasText: 'another-one' }).waitFor();
  await page.locator('#lost').waitFor({ state: 'hidden' });
  assert.equal(await page.getByRole('status').innerText(), 'live');
}, { expected: [/Failed to load resource: .*(503|ERR_)/, /net::ERR_/] });

withStage('nothing there yet: it says what to do', () => snapshot([route('tiny')]), async (page) => {
  const box = page.locator('#no-starts');
  await box.getByText('No cold start yet').waitFor();
  assert.match(await box.innerText(), /curl -N http:\/\/127\.0\.0\.1:8080\/v1\/chat\/completions[^]*"model":"tiny"/);
  assert.equal(await page.locator('#spot').isVisible(), false);
  await accessible(page, 5);
});

withStage('no routes: it says so', () => snapshot([]), async (page) => {
  await page.getByText(/No routes\. Add one/).waitFor();
});

withStage('draining, and routes that are not known yet', everything, async (page, stage) => {
  await page.locator('#draining').waitFor({ state: 'hidden' });
  stage.tell({ about: { draining: true, awaits_routes: true } });
  await page.getByText(/Draining: this replica is shutting down/).waitFor();
  await page.getByText('The routes of the cluster are not known yet.').waitFor();
  await accessible(page);
});

withStage('who wants no motion gets none', everything, async (page) => {
  await card(page, 'qwen3-8b').waitFor();
  assert.equal(await page.evaluate(() => document.getAnimations().length), 0);
}, { reducedMotion: 'reduce' });

withStage('a chosen theme is remembered', everything, async (page) => {
  const ground = () => page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
  const light = await ground();
  const button = page.getByRole('button', { name: /^Theme/ });
  await button.click();
  assert.equal(await ground(), light);
  await button.click();
  const dark = await ground();
  assert.notEqual(dark, light);
  await page.reload();
  await card(page, 'bge-m3').waitFor();
  assert.equal(await ground(), dark);
  assert.equal(await button.getAttribute('aria-label'), 'Theme: Dark');
}, { colorScheme: 'light' });

withStage('on paper it is light and without controls', everything, async (page) => {
  await card(page, 'qwen3-8b').waitFor();
  await page.emulateMedia({ media: 'print' });
  assert.equal(await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor), 'rgb(255, 255, 255)');
  assert.equal(await page.locator('#theme').isVisible(), false);
  await fits(page);
  assert.ok((await page.pdf({ format: 'A4' })).length > 10_000);
}, { colorScheme: 'dark' });
