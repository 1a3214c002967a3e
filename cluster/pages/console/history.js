// The last minutes of a few figures, kept in this page, and lines of them.

import { draw } from "../shared/dom.js";

const KEPT_MS = 300_000;
const LEAST_MS = 60_000;
const GAP_MS = 4000;
const WIDTH = 150;
const HEIGHT = 32;

export const MINUTES = KEPT_MS / 60_000;

/** Samples over time. A value of null is a gap. */
export class Series {
  #samples = [];

  add(value, now = Date.now()) {
    this.#samples.push({ now, value });
    while (this.#samples[0].now < now - KEPT_MS) this.#samples.shift();
  }

  get #values() {
    return this.#samples.map(({ value }) => value).filter((value) => value !== null);
  }

  get lowest() {
    return Math.min(...this.#values);
  }

  get highest() {
    return Math.max(0, ...this.#values);
  }

  /** From its first sample to now, within bounds. */
  #span(now) {
    return Math.max(LEAST_MS, Math.min(KEPT_MS, now - (this.#samples[0]?.now ?? now)));
  }

  /** Runs of [x, y] within WIDTH and HEIGHT; `top` is the value of the upper edge. */
  runs(top, now) {
    const runs = [];
    const span = this.#span(now);
    let before = null;
    for (const sample of this.#samples) {
      if (sample.value !== null) {
        const x = WIDTH * (1 - (now - sample.now) / span);
        const y = HEIGHT - 1 - (HEIGHT - 2) * (top > 0 ? sample.value / top : 0);
        if (before === null || sample.now - before > GAP_MS) runs.push([]);
        runs.at(-1).push([x.toFixed(1), y.toFixed(1)]);
      }
      before = sample.value === null ? null : sample.now;
    }
    return runs;
  }
}

/** A small drawing of one series, or of one above another, fainter one, in one scale. */
export class Sparkline {
  constructor() {
    this.areas = draw("path", { class: "area" });
    this.below = draw("path", { class: "below" });
    this.line = draw("path", { class: "line" });
    this.element = draw(
      "svg",
      { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      this.areas,
      this.below,
      this.line,
    );
  }

  /** `word` tells a value; `top` is that of the upper edge, as high as the series goes when it is not given. */
  show(series, below, word, top = Math.max(series.highest, below.highest), now = Date.now()) {
    const runs = series.runs(top, now);
    this.line.setAttribute("d", runs.map(path).join(""));
    this.areas.setAttribute("d", runs.map(area).join(""));
    this.below.setAttribute("d", below.runs(top, now).map(path).join(""));
    const { lowest, highest } = series;
    const told = Number.isFinite(lowest) ? `${word(lowest)} to ${word(highest)}` : "nothing";
    this.element.setAttribute("aria-label", `In the last ${MINUTES} minutes: ${told}`);
  }
}

const path = (run) => `M${(run.length > 1 ? run : [...run, ...run]).map((point) => point.join(" ")).join("L")}`;
const area = (run) => `${path(run)}L${run.at(-1)[0]} ${HEIGHT}L${run[0][0]} ${HEIGHT}Z`;
