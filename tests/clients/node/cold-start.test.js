// OpenAI's official Node SDK with a route at zero.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI, { toFile } from 'openai';
import { Anteroom, eventually, simRoute } from './harness.js';

const LOAD = ['--load-time', '1500ms'];
const HANG = ['--load-time', '1h', '--hang-load'];
const ask = (more) => ({ model: 'tiny', messages: [{ role: 'user', content: 'Who waits at the door?' }], ...more });
const words = (text) => text.trim().split(/\s+/).length;

/** Defines a test with a proxy and a client with the SDK's defaults; the proxy is stopped and checked at the end. */
function withProxy(name, route, run) {
  test(name, { timeout: 300_000 }, async () => {
    const proxy = await Anteroom.start(route);
    try {
      const client = (options) => new OpenAI({ baseURL: proxy.baseURL, apiKey: 'none', ...options });
      await run(proxy, client);
      await proxy.stop();
    } catch (error) {
      console.error(proxy.lines.join('\n'));
      throw error;
    } finally {
      proxy.process.kill('SIGKILL');
    }
  });
}

async function textOf(stream) {
  let text = '';
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? '';
  return text;
}

/** Returns the SDK's error. */
async function failure(promise) {
  return promise.then(
    () => assert.fail('it did not fail'),
    (error) => error,
  );
}

withProxy('a stream through a cold start, and the same again', simRoute(LOAD), async (proxy, client) => {
  const request = ask({ stream: true, stream_options: { include_usage: true } });
  const chunks = await Array.fromAsync(await client().chat.completions.create(request));
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');
  assert.equal(words(text), 16);
  // The comments are followed by a chunk without content, with the same id.
  assert.equal(chunks[0].choices[0].delta.content, '');
  assert.equal(chunks[1].choices[0].delta.role, 'assistant');
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  assert.equal(chunks.at(-2).choices[0].finish_reason, 'stop');
  assert.equal(chunks.at(-1).usage.completion_tokens, 16);
  assert.equal(await textOf(await client().chat.completions.create(ask({ stream: true }))), text);
  assert.equal((await client().chat.completions.create(ask())).choices[0].message.content, text);
  assert.equal(proxy.starts, 1);
  assert.deepEqual(await proxy.stop(), { completed: 3 });
});

withProxy('a whole answer through a cold start, and what its headers say', simRoute(LOAD), async (proxy, client) => {
  const { data, response, request_id } = await client().chat.completions.create(ask()).withResponse();
  assert.equal(words(data.choices[0].message.content), 16);
  assert.equal(response.headers.get('x-anteroom-cold-start'), 'true');
  assert.match(response.headers.get('server-timing'), /hold;dur=.*upstream;dur=/);
  assert.ok(request_id);
});

const chunkMode = { keepalive: { mode: 'chunk', after: '100ms', interval: '100ms' } };
withProxy('chunk mode', simRoute(LOAD, chunkMode), async (proxy, client) => {
  const chunks = await Array.fromAsync(await client().chat.completions.create(ask({ stream: true })));
  const role = chunks.findIndex((chunk) => chunk.choices[0].delta.role);
  assert.ok(role > 1, 'chunks with no content came before the answer');
  assert.equal(words(chunks.map((chunk) => chunk.choices[0].delta.content).join('')), 16);
});

const whitespaceMode = { keepalive: { mode: 'whitespace', after: '100ms', interval: '100ms' } };
withProxy('whitespace mode', simRoute(LOAD, whitespaceMode), async (proxy, client) => {
  assert.equal(words((await client().chat.completions.create(ask())).choices[0].message.content), 16);
  assert.equal(words(await textOf(await client().chat.completions.create(ask({ stream: true })))), 16);
});

withProxy('fifty at once', simRoute(LOAD, { concurrency: { max: 16, rampStart: 4 } }), async (proxy, client) => {
  const one = async (_, number) =>
    number % 2
      ? (await client().chat.completions.create(ask())).choices[0].message.content
      : textOf(await client().chat.completions.create(ask({ stream: true })));
  const answers = await Promise.all(Array.from({ length: 50 }, one));
  assert.equal(new Set(answers).size, 1);
  assert.equal(proxy.starts, 1);
  assert.deepEqual(await proxy.stop(), { completed: 50 });
});

withProxy('the rest of the API', simRoute(LOAD), async (proxy, client) => {
  const api = client();
  assert.deepEqual((await Array.fromAsync(api.models.list())).map((model) => model.id), ['tiny']);
  assert.equal((await api.models.retrieve('tiny')).id, 'tiny');
  assert.equal(proxy.starts, 0, 'models are known without a model server');
  const events = await Array.fromAsync(await api.responses.create({ model: 'tiny', input: 'Who waits?', stream: true }));
  assert.equal(events[0].type, 'response.created');
  assert.equal(words(events.at(-1).response.output[0].content[0].text), 16);
  const { data } = await api.embeddings.create({ model: 'tiny', input: ['one', 'two'] });
  assert.equal(data.length, 2);
  const file = await toFile(Buffer.alloc(200_000), 'speech.wav');
  assert.ok((await api.audio.transcriptions.create({ model: 'tiny', file })).text);
});

withProxy('a model that nobody serves', simRoute(LOAD), async (proxy, client) => {
  const error = await failure(client().chat.completions.create(ask({ model: 'unheard-of' })));
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.deepEqual([error.status, error.code, error.param], [404, 'model_not_found', 'model']);
  assert.equal(proxy.starts, 0);
});

withProxy('no wait, and then a wait', simRoute(['--load-time', '300ms']), async (proxy, client) => {
  const headers = { 'x-anteroom-max-wait': '0' };
  const error = await failure(client({ maxRetries: 0 }).chat.completions.create(ask(), { headers }));
  assert.ok(error instanceof OpenAI.InternalServerError);
  assert.deepEqual([error.status, error.code], [503, 'no_wait']);
  // The SDK's retries, after the time in Retry-After, find the model ready.
  assert.ok(await client().chat.completions.create(ask(), { headers }));
});

withProxy('a full queue', simRoute(HANG, { hold: { maxRequests: 1 } }), async (proxy, client) => {
  const abort = new AbortController();
  const held = failure(client().chat.completions.create(ask(), { signal: abort.signal }));
  await proxy.waitFor((route) => route.held === 1);
  const error = await failure(client({ maxRetries: 0 }).chat.completions.create(ask()));
  assert.deepEqual([error.status, error.code], [503, 'hold_queue_full']);
  assert.equal(error.headers.get('x-should-retry'), 'true');
  // The client disconnects and is removed from the queue.
  abort.abort();
  assert.ok((await held) instanceof OpenAI.APIUserAbortError);
  await proxy.waitFor((route) => route.held === 0);
  assert.deepEqual(await proxy.stop(), { client_gone: 1 });
});

withProxy('a start that fails', simRoute(['--load-time', '400ms', '--fail-load=3']), async (proxy, client) => {
  const error = await failure(client({ maxRetries: 0 }).chat.completions.create(ask()));
  assert.ok(error instanceof OpenAI.InternalServerError);
  assert.deepEqual([error.status, error.code], [503, 'cold_start_failed']);
  assert.match(error.message, /exited with code 3 while loading\. Its output is in .*\(x-request-id\)/);
});

withProxy('a failure after the early 200', simRoute(['--load-time', '1s', '--fail-load']), async (proxy, client) => {
  const stream = await client().chat.completions.create(ask({ stream: true }));
  const error = await failure(textOf(stream));
  assert.ok(error instanceof OpenAI.APIError);
  assert.equal(error.code, 'cold_start_failed');
  assert.deepEqual(await proxy.stop(), { cold_start_failed: 1 });
});

withProxy('answered just before the client gives up', simRoute(HANG, { keepalive: { mode: 'off' } }), async (proxy, client) => {
  // The SDK sends its timeout as a header only if it is set per request, not for the client.
  const error = await failure(client({ maxRetries: 0 }).chat.completions.create(ask(), { timeout: 4000 }));
  assert.deepEqual([error.status, error.code], [504, 'cold_start_timeout']);
  assert.match(error.message, /the client's own time-out/);
});

withProxy('kept alive beyond its time-out', simRoute(['--load-time', '6s'], { keepalive: {} }), async (proxy, client) => {
  const stream = await client({ maxRetries: 0 }).chat.completions.create(ask({ stream: true }), { timeout: 4000 });
  assert.equal(words(await textOf(stream)), 16);
});

withProxy('a client that stops reading its stream half-way', simRoute(['--tokens', '100000', '--inter-token-time', '10ms']), async (proxy, client) => {
  for await (const chunk of await client().chat.completions.create(ask({ stream: true }))) {
    if (chunk.choices[0].delta.content) break;
  }
  await eventually(async () => (await proxy.route()).in_flight === 0);
  assert.deepEqual(await proxy.stop(), { client_gone: 1 });
});
