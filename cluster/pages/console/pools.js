// How many replicas each pool has and is to have, and the roles of its engines.

import { byId, make, showEach, tell } from "../shared/dom.js";
import { ROLES } from "./workers.js";

export function showPools(pools, workers) {
  byId("pools").hidden = false;
  showEach(byId("pool-rows"), pools, ({ name }) => name, makePool, (row, pool) => updatePool(row, pool, workers));
}

function makePool({ name }) {
  const fields = {
    roles: make("small"),
    replicas: make("td", { class: "number" }),
    target: make("td", { class: "number" }),
    bounds: make("td", { class: "number" }),
  };
  const title = make("th", { scope: "row" }, name, fields.roles);
  return make("tr", { fields }, title, fields.replicas, fields.target, fields.bounds);
}

function updatePool(row, { name, replicas, target, min, max }, workers) {
  const { fields } = row;
  tell(fields.replicas, String(replicas));
  tell(fields.target, String(target));
  tell(fields.bounds, min === max ? "fixed" : `${min} to ${max}`);
  row.className = replicas === target ? "" : "moving";
  const here = workers.filter((worker) => worker.pool === name && worker.load !== undefined);
  const counts = ROLES.map(([role, word]) => [here.filter((worker) => worker.role === role).length, word]);
  tell(fields.roles, counts.filter(([count]) => count).map(([count, word]) => `${count} ${word}`).join(", "));
}
