// How many requests are in each stage, and where.

import { byId, make, showEach, tell } from "../shared/dom.js";
import { compact } from "../shared/words.js";

const MOST_DOTS = 36;
const STEPS = [1, 2, 5];
const PLACES = { encode: "encoder" };

/** `names`: of workers, by address. */
export function showFlow(flow, names) {
  byId("requests").hidden = false;
  const means = dotMeans(Math.max(...flow.map(({ requests }) => requests)));
  tell(byId("dot-means"), means === 1 ? "a dot is a request" : `a dot is ${compact(means)} requests`);
  showEach(byId("flow"), flow, ({ stage }) => stage, makeStage, (element, entry) => updateStage(element, entry, means, names));
}

/** The least round number for which `most` requests need no more than MOST_DOTS dots. */
function dotMeans(most) {
  for (let power = 1; ; power *= 10) {
    const found = STEPS.map((step) => step * power).find((step) => most <= step * MOST_DOTS);
    if (found) return found;
  }
}

function makeStage({ stage }) {
  const fields = {
    count: make("b"),
    dots: make("div", { class: "dots", ariaHidden: "true" }),
    where: make("p", { class: "where" }),
  };
  return make(
    "li",
    { class: stage, fields },
    make("div", { class: "track", ariaHidden: "true" }),
    make("p", { class: "stage" }, make("span", {}, stage), fields.count),
    fields.dots,
    fields.where,
  );
}

function updateStage(element, { stage, requests, at }, means, names) {
  const { count, dots, where } = element.fields;
  element.classList.toggle("busy", requests > 0);
  tell(count, compact(requests));
  const wanted = Math.ceil(requests / means);
  while (dots.childElementCount > wanted) dots.lastElementChild.remove();
  while (dots.childElementCount < wanted) dots.append(make("i"));
  tell(where, placed(stage, Object.entries(at), names));
}

function placed(stage, places, names) {
  if (places.length === 0) return "";
  if (places.length === 1) return `at ${names.get(places[0][0]) ?? places[0][0]}`;
  const most = Math.max(...places.map(([, count]) => count));
  return `${places.length} ${PLACES[stage] ?? "engine"}s, most ${most}`;
}
