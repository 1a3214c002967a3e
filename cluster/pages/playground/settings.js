// What requests ask for beside the messages, kept in this browser.

import { byId } from "../shared/dom.js";
import { startTheme } from "../shared/themes.js";

const NUMBERS = ["temperature", "top_p", "top_k", "seed", "max_tokens", "reasoning_max_tokens"];
const KEPT = [...NUMBERS, "system", "thinking", "zoom"];
const KEY = "ernie-settings";

/** Wires the dialog, the choices below the message and the theme. */
export function startSettings() {
  const dialog = byId("settings");
  byId("open-settings").addEventListener("click", () => dialog.showModal());
  byId("reset").addEventListener("click", () => fill({}));
  fill(JSON.parse(localStorage.getItem(KEY) ?? "{}"));
  for (const id of KEPT) byId(id).addEventListener("change", keep);
  dialog.addEventListener("close", keep);
  startTheme();
}

/** Fields of a request. Empty ones are left out: the model chooses. */
export function requestFields() {
  const fields = {};
  for (const id of NUMBERS) {
    if (byId(id).value !== "") fields[id] = byId(id).valueAsNumber;
  }
  const thinking = byId("thinking").value;
  if (thinking) fields.enable_thinking = thinking === "on";
  return fields;
}

export const system = () => byId("system").value.trim();
export const zoomOffered = () => byId("zoom").checked;

/** Sets the choices an example comes with; its answer is to be the likeliest one. */
export function choose({ thinking = "", zoom = false }) {
  byId("thinking").value = thinking;
  byId("zoom").checked = zoom;
  byId("temperature").value = 0;
}

function fill(values) {
  for (const id of KEPT) {
    const field = byId(id);
    if (field.type === "checkbox") field.checked = values[id] ?? false;
    else field.value = values[id] ?? "";
  }
}

function keep() {
  const values = KEPT.map((id) => [id, byId(id).type === "checkbox" ? byId(id).checked : byId(id).value]);
  localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(values)));
}
