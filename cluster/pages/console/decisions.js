// What the planner decided and what became of the fleet, the newest first.

import { byId, make, showEach, tell } from "../shared/dom.js";
import { clock } from "../shared/words.js";

const list = byId("decision-list");
const kinds = new Map();
let latest = [];

export function showDecisions(decisions) {
  byId("decisions").hidden = false;
  latest = decisions;
  for (const { kind } of decisions) if (!kinds.has(kind)) addKind(kind);
  draw();
  // What was decided before the page was opened is not read out.
  list.ariaLive = "polite";
}

function draw() {
  const shown = latest.filter(({ kind }) => kinds.get(kind).ariaPressed === "true").reverse();
  showEach(list, shown, ({ number, time_s: time }) => `${time}/${number}`, makeEntry, () => {});
  byId("undecided").hidden = shown.length > 0;
  list.hidden = shown.length === 0;
}

function addKind(kind) {
  const button = make("button", { type: "button", class: "quiet", ariaPressed: "true" }, kind);
  button.addEventListener("click", () => {
    button.ariaPressed = String(button.ariaPressed !== "true");
    draw();
  });
  kinds.set(kind, button);
  byId("kinds").append(button);
}

function makeEntry({ time_s: time, kind, pool, subject, change, reason }) {
  const when = make("time", { dateTime: new Date(time * 1000).toISOString() }, clock(time));
  const what = make("span", { class: "what" }, make("b", {}, subject), ` ${change.replace("->", "\u2192")}`);
  const entry = make("li", {}, when, make("span", { class: "kind" }, kind), what);
  const why = [reason, subject.startsWith(pool) ? "" : `in ${pool}`].filter(Boolean).join(" \u00b7 ");
  if (why) entry.append(make("p", {}, why));
  return entry;
}
