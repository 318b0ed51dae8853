// Anthropic's official Node SDK: the Messages API through a cold start, and its exceptions on failures.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import Anthropic from '@anthropic-ai/sdk';
import { Anteroom, simRoute } from './harness.js';

const ask = (more) => ({ model: 'tiny', max_tokens: 16, messages: [{ role: 'user', content: 'Who waits at the door?' }], ...more });

/** Defines a test with a proxy and a client with the SDK's defaults; the proxy is stopped and checked at the end. */
function withProxy(name, route, run) {
  test(name, { timeout: 300_000 }, async () => {
    const proxy = await Anteroom.start(route);
    try {
      await run(proxy, (options) => new Anthropic({ baseURL: proxy.url, apiKey: 'none', ...options }));
      await proxy.stop();
    } catch (error) {
      console.error(proxy.lines.join('\n'));
      throw error;
    } finally {
      proxy.process.kill('SIGKILL');
    }
  });
}

/** Returns the SDK's exception, and the error in it. */
async function failure(promise) {
  const exception = await promise.then(() => assert.fail('it did not fail'), (error) => error);
  assert.ok(exception instanceof Anthropic.APIError, String(exception));
  return [exception, exception.error.error];
}

async function drained(stream) {
  for await (const _ of stream);
}

withProxy('a stream through a cold start', simRoute(['--load-time', '1s']), async (proxy, client) => {
  const message = await client().messages.stream(ask()).finalMessage();
  assert.ok(message.content[0].text);
  assert.deepEqual(await proxy.stop(), { completed: 1 });
});

withProxy('an unknown model', simRoute([]), async (proxy, client) => {
  for (const stream of [false, true]) {
    const [exception, error] = await failure(client().messages.create(ask({ model: 'unheard-of', stream })));
    assert.ok(exception instanceof Anthropic.NotFoundError);
    assert.deepEqual([error.type, error.code], ['not_found_error', 'model_not_found']);
    assert.equal(exception.requestID, exception.error.request_id);
  }
  assert.equal(proxy.starts, 0);
});

withProxy('a start that fails', simRoute(['--load-time', '400ms', '--fail-load=3']), async (proxy, client) => {
  // With the SDK's defaults: after two failures for the same reason, a third start is not attempted.
  const [exception, error] = await failure(client().messages.create(ask()));
  assert.deepEqual([exception.status, error.type, error.code], [503, 'api_error', 'cold_start_failed']);
  assert.match(error.message, /exited with code 3 while loading\. Its output is in .*\(x-request-id\)/);
  assert.equal(exception.headers.get('x-should-retry'), 'false');
  assert.deepEqual(await proxy.stop(), { cold_start_failed: 2 });
});

withProxy('a failure after the early 200', simRoute(['--load-time', '1s', '--fail-load']), async (proxy, client) => {
  const [, error] = await failure(drained(await client().messages.create(ask({ stream: true }))));
  assert.deepEqual([error.type, error.code], ['api_error', 'cold_start_failed']);
  assert.deepEqual(await proxy.stop(), { cold_start_failed: 1 });
});
