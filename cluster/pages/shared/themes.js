// The button of the header that chooses between light and dark.

import { byId } from "./dom.js";

const THEMES = ["auto", "light", "dark"];

/** Wires it; the choice is kept in this browser and holds for all pages. */
export function startTheme() {
  const root = document.documentElement;
  const tell = () => {
    const { theme } = root.dataset;
    byId("theme-name").textContent = theme[0].toUpperCase() + theme.slice(1);
    byId("theme").ariaLabel = `Theme: ${theme}`;
  };
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
    localStorage.setItem("ernie-theme", root.dataset.theme);
    tell();
  });
  tell();
}
