// The row of figures at the top, each with its last minutes.

import { byId, make, tell } from "../shared/dom.js";
import { compact, many, percent, seconds } from "../shared/words.js";
import { MINUTES, Series, Sparkline } from "./history.js";

const NONE = "\u2013";

/** A figure: its name, what it is now, a line of more, and a drawing. `word` tells a value. */
class Tile {
  constructor(name, word) {
    this.word = word;
    this.value = make("b", {}, NONE);
    this.more = make("span", { class: "more" });
    this.spark = new Sparkline();
    this.series = new Series();
    this.below = new Series();
    this.element = make("li", { class: "tile" }, make("h3", {}, name), this.value, this.more, this.spark.element);
    this.element.hidden = true;
    byId("tiles").append(this.element);
  }

  hide() {
    this.element.hidden = true;
    this.series.add(null);
    this.below.add(null);
  }

  /** `sample` is drawn; `value`, unless it is the same, is told. */
  show(sample, more, { value = sample, below = null, top } = {}) {
    this.element.hidden = false;
    tell(this.value, value === null ? NONE : this.word(value));
    tell(this.more, more);
    this.series.add(sample);
    this.below.add(below);
    this.spark.show(this.series, this.below, this.word, top);
  }
}

const LATENCIES = [
  ["ttft_s", new Tile("Time to first token", seconds)],
  ["tpot_s", new Tile("Time per output token", seconds)],
  ["e2e_s", new Tile("Whole request", seconds)],
];
const requests = new Tile("Requests", compact);
const attained = new Tile("Within objectives", (share) => percent(share, 1));
const kv = new Tile("KV cache", (share) => percent(share));
byId("tiles").prepend(requests.element);

export function showFigures(status) {
  byId("figures").hidden = false;
  const { latency } = status;
  const rate = latency ? `${(latency.count / latency.window_s).toFixed(1)} ended per second` : `in the last ${MINUTES} minutes`;
  requests.show(status.active_requests, rate);
  for (const [name, tile] of LATENCIES) {
    if (!latency) tile.hide();
    else if (!latency[name]) tile.show(null, `none in ${latency.window_s} s`);
    else {
      const { p50, p95, p99 } = latency[name];
      tile.show(p95, `p95 ${seconds(p95)} \u00b7 p99 ${seconds(p99)}`, { value: p50, below: p50 });
    }
  }
  showObjectives(latency?.slo);
  showCache(status.engines);
}

/** Where none are set there is nothing to meet. */
function showObjectives(slo) {
  const bounds = [
    [slo?.ttft_s, "TTFT"],
    [slo?.tpot_s, "TPOT"],
  ].filter(([bound]) => bound != null);
  if (bounds.length === 0) {
    attained.hide();
    return;
  }
  const words = bounds.map(([bound, of]) => `${of} ${bound} s`).join(" \u00b7 ");
  attained.show(slo.met, words, { top: 1 });
}

function showCache(engines) {
  const loads = engines.map(({ load }) => load).filter(Boolean);
  const tokens = (field) => loads.reduce((sum, load) => sum + load[field] * load.block_size, 0);
  const total = tokens("total_blocks");
  if (total === 0) {
    kv.hide();
    return;
  }
  const used = total - tokens("free_blocks");
  kv.show(used / total, `${compact(used)} of ${many(total, "token")}`, { top: 1 });
}
