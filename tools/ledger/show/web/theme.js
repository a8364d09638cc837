// Runs before the page is painted, so that it does not flash in the other theme.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("bankshot-theme");
  } catch {
    // a browser may keep no storage for local files
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
