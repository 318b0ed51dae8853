// Applies the stored theme before the first paint.
'use strict';
(() => {
  const KEY = 'anteroom-theme';
  const ORDER = ['auto', 'light', 'dark'];
  const root = document.documentElement;
  let theme = 'auto';
  const remembered = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // Storage may be forbidden; then it is not remembered.
    }
  };
  const use = (name) => {
    theme = ORDER.includes(name) ? name : 'auto';
    if (theme === 'auto') delete root.dataset.theme;
    else root.dataset.theme = theme;
  };
  use(remembered());
  addEventListener('DOMContentLoaded', () => {
    const button = document.getElementById('theme');
    const show = () => {
      button.textContent = { auto: 'Auto', light: 'Light', dark: 'Dark' }[theme];
      button.setAttribute('aria-label', `Theme: ${button.textContent}`);
      button.title = theme === 'auto' ? 'Theme: as the system' : `Theme: ${theme}`;
    };
    button.addEventListener('click', () => {
      use(ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length]);
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // See above.
      }
      show();
    });
    show();
  });
})();
