// Light, dark, or as the system has it.

import { byId } from "./dom.js";

const KEPT = "expertmesh theme";
const NAMES = { "": "Auto", light: "Light", dark: "Dark" };
const SAID = { "": "as the system", light: "light", dark: "dark" };

export function startTheme() {
  use(localStorage.getItem(KEPT) ?? "");
  byId("theme").addEventListener("click", () => {
    const order = Object.keys(NAMES);
    const next = order[(order.indexOf(document.documentElement.dataset.theme ?? "") + 1) % order.length];
    localStorage.setItem(KEPT, next);
    use(next);
  });
}

function use(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").textContent = NAMES[theme] ?? NAMES[""];
  byId("theme").setAttribute("aria-label", `Colours: ${SAID[theme] ?? SAID[""]}`);
}
