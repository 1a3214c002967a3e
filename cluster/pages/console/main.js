// The page: what the router tells, shown; and how old it is.

import { byId, make, tell } from "../shared/dom.js";
import { startTheme } from "../shared/themes.js";
import { clock } from "../shared/words.js";
import { showDecisions } from "./decisions.js";
import { updateDetails } from "./details.js";
import { followStatus } from "./feed.js";
import { showFigures } from "./figures.js";
import { showFlow } from "./flow.js";
import { MINUTES } from "./history.js";
import { showPools } from "./pools.js";
import { showTopology } from "./topology.js";
import { workersOf } from "./workers.js";

const STALE_MS = 3000;

let heardAt = null;
let seenAt = Date.now();

startTheme();
followStatus(show, failed);
setInterval(showAge, 1000);
document.addEventListener("visibilitychange", () => (seenAt = Date.now()));

/** Members that a router does not tell are not shown. */
function show(status) {
  heardAt = Date.now();
  const workers = workersOf(status);
  const names = new Map(workers.map(({ address, short }) => [address, short]));
  showModel(status);
  showFigures(status);
  if (status.flow) showFlow(status.flow, names);
  if (status.pools) showPools(status.pools, workers);
  showTopology(workers, status.loading);
  if (status.decisions) showDecisions(status.decisions);
  updateDetails(workers, status.flow);
  tell(byId("footer"), `Asked once a second while this page is seen. Lines show the last ${MINUTES} minutes. Planner term ${status.planner_term}.`);
  showAge();
}

function showModel({ ready, model, missing }) {
  const line = byId("model");
  line.className = ready ? "ready" : "away";
  const words = ready ? model : `${model}, not ready: ${missing}`;
  if (line.textContent !== words) line.replaceChildren(make("span", {}, words));
  line.title = words;
}

function failed(error) {
  if (!("status" in error) && error.name !== "TimeoutError") console.error(error);
  if (heardAt === null) complain("The router does not answer. It is asked again every second.");
}

function showAge() {
  if (heardAt === null || document.hidden) return;
  // A page that was hidden asks first.
  const stale = Date.now() - Math.max(heardAt, seenAt) > STALE_MS;
  document.body.classList.toggle("stale", stale);
  if (!stale) {
    byId("trouble").hidden = true;
    return;
  }
  byId("model").className = "away";
  complain(`The router has not answered since ${clock(heardAt / 1000)}. What is shown is of then; it is asked again every second.`);
}

function complain(words) {
  tell(byId("trouble"), words);
  byId("trouble").hidden = false;
  if (heardAt === null) {
    byId("model").className = "away";
    byId("model").replaceChildren(make("span", {}, "not reachable"));
  }
}
