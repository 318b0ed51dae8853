// Sparkline of held requests in the last two minutes.

import { attr, s } from './dom.js';
import { count } from './words.js';

const [WIDTH, HEIGHT, TOP] = [120, 32, 3];
/** Number of seconds kept by the server. */
export const KEPT = 120;

export function sparkline() {
  const area = s('path', { class: 'area' });
  const line = s('path', { class: 'line' });
  const node = s('svg', { class: 'spark', viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img' }, area, line);
  return { node, area, line };
}

/** Draws numbers, oldest first, newest at the right. The full height is at least 4. */
export function draw({ node, area, line }, values) {
  const most = values.reduce((most, value) => Math.max(most, value), 0);
  attr(node, 'aria-label', `Held in the last 2 minutes: at most ${count(most, 'request')}`);
  attr(node, 'data-empty', most === 0);
  const height = Math.max(4, most);
  const y = (value) => (HEIGHT - 1 - (value / height) * (HEIGHT - 1 - TOP)).toFixed(1);
  const first = WIDTH - values.length;
  let path = '';
  values.forEach((value, index) => {
    // Only corners: a quiet line has few.
    const corner = index === 0 || index === values.length - 1 || value !== values[index - 1] || value !== values[index + 1];
    if (corner) path += `${path ? 'L' : 'M'}${first + index + 1} ${y(value)}`;
  });
  attr(line, 'd', path || null);
  attr(area, 'd', path ? `${path}V${HEIGHT}H${first + 1}Z` : null);
}
