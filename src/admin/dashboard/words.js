// Names and number formats, consistent with the documents and the command line.

/** Phases in order: name and description. */
export const PHASES = {
  signal: ['signal', 'until the scaler has received the demand'],
  scale: ['scale', 'until the number of replicas is raised'],
  create: ['create', 'until the pod exists'],
  schedule: ['schedule', 'until the pod has a node'],
  pull: ['pull', 'until its images are on the node'],
  start: ['start', 'until the model server runs'],
  load: ['load', 'until its readiness probe succeeds'],
  propagate: ['propagate', 'until the proxy may dispatch'],
  dispatch: ['dispatch', 'until the first held request is sent'],
  first_byte: ['first byte', 'until the first byte of its response'],
  first_token: ['first token', 'until the first token of that response'],
};

/** Names of parts of phases. */
const PARTS = {
  node_create: 'node created',
  node_ready: 'node ready',
  engine_start: 'engine start',
  weights_download: 'weights download',
  weights: 'weights',
  compile: 'compilation',
  warmup: 'warm-up',
  server_start: 'server start',
};

export const STATES = ['starting', 'failed', 'ready', 'stopping', 'sleeping', 'idle'];

const OBSTACLES = {
  autoscaling_paused: 'Autoscaling is paused',
  no_scaled_object: 'No ScaledObject names the route',
  no_keda_stream: 'KEDA has no open stream',
  push_dropped: 'KEDA drops pushes',
  image_pull: 'The image cannot be pulled',
  crash_loop: 'The container exits repeatedly',
  unschedulable: 'No node accepts the pod',
  quota: 'The pod is rejected',
  out_of_memory: 'Out of memory',
  scale_refused: 'The workload cannot be scaled',
  api_server_unreachable: 'The Kubernetes API server is unreachable',
  no_service: 'The Service or its port is missing',
  no_pods_selected: 'The Service selects none of its pods',
  port_refused: 'Nothing listens on the Service’s port',
  volume: 'A volume cannot be mounted',
  not_ready: 'The pod is not ready',
  name_unresolved: 'Its host name does not resolve',
  probe_rejected: 'The probe is rejected',
  not_answering: 'The server does not answer yet',
};

const plain = (name) => String(name).replaceAll('_', ' ');
export const phaseName = (name) => PHASES[name]?.[0] ?? plain(name);
export const phaseMeaning = (name) => PHASES[name]?.[1] ?? '';
export const partName = (name) => PARTS[name] ?? plain(name);
export const obstacleName = (kind) => OBSTACLES[kind] ?? plain(kind);
/** Colour of a phase, from theme.css. */
export const phaseColour = (name) => (name in PHASES ? `var(--phase-${name.replaceAll('_', '-')})` : 'var(--phase-other)');

/** Formats `1.3 ms`, `412 ms`, `3.07 s`, `277.4 s`, `24 min 37 s`, `2 h 5 min`. */
export function duration(ms) {
  if (!(ms >= 0)) return '–';
  if (ms === 0) return '0';
  if (ms < 0.1) return '<0.1 ms';
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${Math.round(ms)} ms`;
  if (ms < 9_995) return `${(ms / 1e3).toFixed(2)} s`;
  if (ms < 999_950) return `${(ms / 1e3).toFixed(1)} s`;
  return long(Math.round(ms / 1e3));
}

/** Formats a changing duration with few digits. */
export function rough(ms) {
  if (!(ms >= 0)) return '–';
  return ms < 999_950 ? `${(ms / 1e3).toFixed(1)} s` : long(Math.round(ms / 1e3));
}

function long(seconds) {
  const [minutes, hours, days] = [Math.floor(seconds / 60), Math.floor(seconds / 3600), Math.floor(seconds / 86_400)];
  if (days > 0) return `${days} d ${hours % 24} h`;
  if (hours > 0) return `${hours} h ${minutes % 60} min`;
  if (minutes > 0) return `${minutes} min ${seconds % 60} s`;
  return `${seconds} s`;
}

/** Formats an age: whole seconds, then coarser. */
export function span(ms) {
  const seconds = Math.max(0, Math.round(ms / 1e3));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return long(seconds);
}

export const ago = (ms) => (ms < 1500 ? 'just now' : `${span(ms)} ago`);

/** `<1 %`, `98 %`. */
export function share(part, whole) {
  const percent = whole > 0 ? (100 * part) / whole : 0;
  if (percent > 0 && percent < 1) return '<1 %';
  if (percent > 99 && percent < 100) return '>99 %';
  return `${Math.round(percent)} %`;
}

const NUMBERS = new Intl.NumberFormat('en');
export const number = (value) => NUMBERS.format(value);
export const count = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;

/** Formats the outcome of a cold start. */
export function outcome(record) {
  const wake = record.kind === 'wake';
  if (!record.outcome) return { word: wake ? 'waking' : 'running', icon: 'starting' };
  return {
    completed: { word: wake ? 'woken' : 'completed', icon: 'ready' },
    abandoned: { word: 'abandoned', icon: 'abandoned' },
    failed: { word: 'failed', icon: 'failed' },
  }[record.outcome] ?? { word: plain(record.outcome), icon: 'idle' };
}

/** URL of a request's timeline; an id may contain anything. */
export const requestUrl = (id) => `api/v1/requests/${id.split('/').map(encodeURIComponent).join('/')}`;
