// Everything about one worker, in a dialog that stays up to date while it is open.

import { byId, make, showEach, tell } from "../shared/dom.js";
import { compact, many, percent } from "../shared/words.js";
import { ROLES } from "./workers.js";

const dialog = byId("details");
let shown = null;
let latest = [];

export function openDetails(key) {
  shown = key;
  draw();
  dialog.showModal();
}

/** Every worker as last told; `flow` says which requests are where. */
export function updateDetails(workers, flow) {
  latest = workers.map((worker) => ({ ...worker, stages: stagesAt(worker.address, flow ?? []) }));
  if (dialog.open) draw();
}

function draw() {
  const worker = latest.find(({ key }) => key === shown);
  if (!worker) {
    showEach(byId("details-facts"), [["state", "gone"]], ([name]) => name, makeFact, updateFact);
    return;
  }
  tell(byId("details-title"), worker.id);
  showEach(byId("details-facts"), factsOf(worker), ([name]) => name, makeFact, updateFact);
  showEach(byId("details-notes"), worker.notes ?? [], (note) => note, (note) => make("li", {}, note), () => {});
}

const makeFact = ([name]) => make("div", {}, make("dt", {}, name), make("dd"));
const updateFact = (element, [, value]) => tell(element.lastElementChild, value);

function stagesAt(address, flow) {
  return flow.filter(({ at }) => at[address]).map(({ stage, at }) => `${at[address]} in ${stage}`);
}

function factsOf({ pool, role, state, address, dtype, load, group, queued_patches: patches, stages }) {
  const facts = [
    ["role", ROLES.find(([name]) => name === role)[1]],
    ["state", state],
    ["pool", pool],
    ["address", address],
  ];
  if (dtype) facts.push(["dtype", dtype]);
  if (patches !== undefined) facts.push(["queued", `${patches} patches`]);
  if (stages.length) facts.push(["requests here", stages.join(", ")]);
  if (load) {
    const size = load.block_size;
    const used = load.total_blocks - load.free_blocks;
    facts.push(
      ["KV cache", `${compact(used * size)} of ${many(load.total_blocks * size, "token")}; ${compact(load.cached_blocks * size)} cached`],
      ["sequences", `${load.running} running, ${load.waiting} waiting, ${load.reserved} reserved`],
      ["queued", many(load.queued_tokens, "token")],
      ["preempted", many(load.preemptions, "sequence")],
    );
    const asked = load.prefix_queried_tokens;
    if (asked) facts.push(["prefix hits", `${percent(load.prefix_hit_tokens / asked)} of ${many(asked, "token")}`]);
  }
  if (group) {
    facts.push(
      ["ranks", String(group.ranks)],
      ["expert skew", `${group.text_skew.toFixed(2)} text, ${group.vision_skew.toFixed(2)} vision`],
      ["experts moved", String(group.moved_experts)],
    );
  }
  return facts;
}
