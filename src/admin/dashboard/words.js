// What things are called, and how numbers are written: here as in the documents and on the command line.

/** The phases in their order: what each is called, and what it is. */
export const PHASES = {
  signal: ['signal', 'until whoever starts the target knows'],
  scale: ['scale', 'until the number of replicas is raised'],
  create: ['create', 'until the pod exists'],
  schedule: ['schedule', 'until the pod has a node'],
  pull: ['pull', 'until its images are there'],
  start: ['start', 'until the model server runs'],
  load: ['load', 'until it answers its readiness probe'],
  propagate: ['propagate', 'until we know, and may send'],
  dispatch: ['dispatch', 'until the first held request is sent'],
  first_byte: ['first byte', 'until its answer begins'],
  first_token: ['first token', 'until the first token of that answer'],
};

/** What parts of phases are called. */
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
  no_scaled_object: 'No ScaledObject names it',
  no_keda_stream: 'KEDA does not listen',
  push_dropped: 'KEDA drops our pushes',
  image_pull: 'The image cannot be pulled',
  crash_loop: 'The container ends again and again',
  unschedulable: 'No node takes the pod',
  quota: 'The pod is refused',
  out_of_memory: 'Out of memory',
  scale_refused: 'It cannot be scaled',
  api_server_unreachable: 'The Kubernetes API server is not heard',
  no_service: 'The Service or its port is missing',
  no_pods_selected: 'The Service selects none of its pods',
  port_refused: 'Nothing listens where the Service leads to',
  volume: 'A volume cannot be mounted',
  not_ready: 'The pod does not get ready',
  name_unresolved: 'Its host name does not resolve',
  probe_rejected: 'The probe is rejected',
  not_answering: 'It does not answer yet',
};

const plain = (name) => String(name).replaceAll('_', ' ');
export const phaseName = (name) => PHASES[name]?.[0] ?? plain(name);
export const phaseMeaning = (name) => PHASES[name]?.[1] ?? '';
export const partName = (name) => PARTS[name] ?? plain(name);
export const obstacleName = (kind) => OBSTACLES[kind] ?? plain(kind);
/** Its colour, from theme.css. */
export const phaseColour = (name) => (name in PHASES ? `var(--phase-${name.replaceAll('_', '-')})` : 'var(--phase-other)');

/** `1.3 ms`, `412 ms`, `3.07 s`, `277.4 s`, `24 min 37 s`, `2 h 5 min`. */
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

/** The same for what changes while one looks: no more digits than one can read. */
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

/** How long ago, or for how long: whole seconds, then coarser. */
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

/** How a cold start ended, or that it has not. */
export function outcome(record) {
  const wake = record.kind === 'wake';
  if (!record.outcome) return { word: wake ? 'waking' : 'running', icon: 'starting' };
  return {
    completed: { word: wake ? 'woken' : 'completed', icon: 'ready' },
    abandoned: { word: 'abandoned', icon: 'abandoned' },
    failed: { word: 'failed', icon: 'failed' },
  }[record.outcome] ?? { word: plain(record.outcome), icon: 'idle' };
}

/** Where the story of a request is told; an id may be anything. */
export const requestUrl = (id) => `api/v1/requests/${id.split('/').map(encodeURIComponent).join('/')}`;
