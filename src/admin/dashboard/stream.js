// Server-sent events over fetch: unlike EventSource, it exposes the error response and detects silence.

/** Silence in milliseconds that means a lost connection; the server sends at least once a second. */
const SILENCE = 6_000;
const FIRST_WAIT = 500;
const LONGEST_WAIT = 5_000;

/**
 * Follows the events at `url` until stopped. Calls `onEvent(name, data)`, and `onLink(state, why)` with the states
 * `connecting`, `live` and `lost`.
 */
export function follow(url, onEvent, onLink) {
  const stopping = new AbortController();
  (async () => {
    let wait = FIRST_WAIT;
    for (;;) {
      onLink('connecting');
      const why = await once(url, stopping.signal, (name, data) => {
        wait = FIRST_WAIT;
        onLink('live');
        onEvent(name, data);
      });
      if (stopping.signal.aborted) return;
      onLink('lost', why);
      await new Promise((resolve) => setTimeout(resolve, wait));
      if (stopping.signal.aborted) return;
      wait = Math.min(LONGEST_WAIT, wait * 2);
    }
  })();
  return () => stopping.abort();
}

/** Reads one connection to its end and returns the reason. */
async function once(url, stopping, onEvent) {
  const abort = new AbortController();
  const stop = () => abort.abort();
  stopping.addEventListener('abort', stop);
  let alarm;
  const heard = () => {
    clearTimeout(alarm);
    alarm = setTimeout(stop, SILENCE);
  };
  try {
    heard();
    const answer = await fetch(url, { signal: abort.signal, cache: 'no-store', headers: { accept: 'text/event-stream' } });
    if (!answer.ok) {
      const body = await answer.json().catch(() => ({}));
      return typeof body.error === 'string' ? body.error : `it answered ${answer.status}`;
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = '';
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return 'the connection was closed';
      heard();
      buffer += value;
      for (let end; (end = buffer.indexOf('\n\n')) >= 0; buffer = buffer.slice(end + 2)) {
        const event = parse(buffer.slice(0, end));
        if (event?.name === 'end') return 'Anteroom has stopped';
        if (event) tell(onEvent, event);
      }
    }
  } catch {
    return 'Anteroom does not answer';
  } finally {
    clearTimeout(alarm);
    stopping.removeEventListener('abort', stop);
    abort.abort();
  }
}

/** Reports errors of handlers without dropping the connection. */
function tell(onEvent, { name, data }) {
  try {
    onEvent(name, JSON.parse(data));
  } catch (error) {
    reportError(error);
  }
}

/** Parses the lines of an event; null for a comment. */
function parse(block) {
  let name = 'message';
  let data = null;
  for (const line of block.split('\n')) {
    if (line.startsWith('event: ')) name = line.slice(7);
    else if (line.startsWith('data: ')) data = (data ?? '') + line.slice(6);
  }
  return data === null ? null : { name, data };
}
