// Nodes and the workers on each, with roles and loads.

import { byId, make, showEach, tell } from "../shared/dom.js";
import { compact, many, percent } from "../shared/words.js";
import { openDetails } from "./details.js";
import { byNode, kvShares, ROLES } from "./workers.js";

const FULL = 0.9;

byId("legend").append(
  ...ROLES.map(([role, word, letters]) => make("li", {}, make("i", { class: `role ${role}`, ariaHidden: "true" }, letters), word)),
);

export function showTopology(workers, loading) {
  byId("nodes").hidden = false;
  const nodes = byNode(workers);
  const engines = workers.filter(({ load }) => load !== undefined).length;
  tell(byId("fleet-size"), `${many(nodes.length, "node")}, ${many(engines, "engine")}${loading.length ? `, ${loading.length} loading` : ""}`);
  showEach(byId("loading"), loading.map((one, index) => ({ ...one, index })), ({ index }) => String(index), makeLoading, updateLoading);
  showEach(byId("cards"), nodes, ({ name }) => name, makeCard, updateCard);
}

/** A word, and a shorter one where there is little room. */
const eitherWord = (long, short) => [make("span", { class: "long" }, long), make("span", { class: "short", ariaHidden: "true" }, short)];

function makeCard({ name }) {
  const fields = { sum: make("small"), rows: make("tbody") };
  const heads = [
    ["", make("span", { class: "hidden" }, "role")],
    ["", "worker"],
    ["number", "KV"],
    ["number", ...eitherWord("running", "run")],
    ["number", ...eitherWord("waiting", "wait")],
    ["number", ...eitherWord("tokens", "tok")],
  ];
  const head = make("tr", {}, ...heads.map(([kind, ...words]) => make("th", { scope: "col", class: kind }, ...words)));
  head.lastElementChild.title = "tokens queued";
  const table = make("table", { ariaLabel: `Workers on ${name}` }, make("thead", {}, head), fields.rows);
  return make("article", { class: "node", fields }, make("header", {}, make("h3", {}, name), fields.sum), table);
}

function updateCard(card, { workers }) {
  tell(card.fields.sum, summed(workers));
  showEach(card.fields.rows, workers, ({ key }) => key, makeWorker, updateWorker);
}

function summed(workers) {
  const loads = workers.map(({ load }) => load).filter(Boolean);
  const running = loads.reduce((sum, load) => sum + load.running, 0);
  return loads.length ? `${running} running` : "";
}

function roleBadge() {
  const [long, short] = eitherWord("", "");
  return make("span", { class: "role", fields: { long, short } }, long, short);
}

function updateRole(badge, role) {
  const [, word, letters] = ROLES.find(([name]) => name === role);
  tell(badge.fields.long, word);
  tell(badge.fields.short, letters);
  badge.className = `role ${role}`;
}

function makeWorker(worker) {
  const badge = roleBadge();
  const prefix = worker.id.slice(0, worker.id.length - worker.short.length);
  const name = make("button", { type: "button", class: "name" }, make("span", { class: "prefix" }, prefix), worker.short);
  name.addEventListener("click", () => openDetails(worker.key));
  const cells = [make("td", {}, badge), make("th", { scope: "row" }, name)];
  const fields = { badge };
  if (worker.load === undefined) {
    fields.note = make("td", { class: "number note", colSpan: 4 });
    cells.push(fields.note);
  } else {
    fields.kv = make("span");
    fields.used = make("i", { class: "used" });
    fields.cached = make("i", { class: "cached" });
    cells.push(make("td", { class: "number" }, make("div", { class: "bar" }, fields.used, fields.cached, fields.kv)));
    for (const field of ["running", "waiting", "queued"]) cells.push((fields[field] = make("td", { class: "number" })));
  }
  return make("tr", { fields }, ...cells);
}

function updateWorker(row, { role, state, load, queued_patches: patches }) {
  const { fields } = row;
  updateRole(fields.badge, role);
  row.className = `${role} ${state}`;
  if (fields.note) {
    tell(fields.note, patches === undefined ? "" : `${compact(patches)} patches queued`);
    return;
  }
  const { used, cached } = load ? kvShares(load) : { used: 0, cached: 0 };
  fields.used.style.width = `${used * 100}%`;
  fields.used.classList.toggle("full", used >= FULL);
  fields.cached.style.width = `${cached * 100}%`;
  tell(fields.kv, state === "ready" ? percent(used) : state);
  tell(fields.running, load ? compact(load.running) : "");
  tell(fields.waiting, load ? compact(load.waiting) : "");
  tell(fields.queued, load ? compact(load.queued_tokens) : "");
}

function makeLoading() {
  const fields = { badge: roleBadge(), pool: make("span"), used: make("i", { class: "used" }), share: make("span"), told: make("small") };
  const bar = make("div", { class: "bar" }, fields.used, fields.share);
  return make("li", { fields }, fields.badge, fields.pool, bar, fields.told);
}

function updateLoading(item, { pool, role, ranks, progress }) {
  const { badge, pool: name, used, share, told } = item.fields;
  updateRole(badge, role);
  item.className = role;
  tell(name, pool);
  const sum = (field) => ranks.reduce((all, rank) => all + rank[field], 0);
  const done = sum("bytes_total") ? sum("bytes_done") / sum("bytes_total") : 0;
  used.style.width = `${done * 100}%`;
  tell(share, percent(done));
  tell(told, progress || "begins");
}
