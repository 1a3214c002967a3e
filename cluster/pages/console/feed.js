// Asks the router once a second what the cluster does, while somebody looks.

import { clusterStatus } from "../shared/api.js";

const PERIOD_MS = 1000;
const TIMEOUT_MS = 5000;

/** Calls `told(status)` for every answer, and `failed(error)` where none came. A hidden page asks nothing. */
export function followStatus(told, failed) {
  let timer = null;
  let asking = null;

  async function ask() {
    const began = performance.now();
    const mine = (asking = new AbortController());
    try {
      told(await clusterStatus(AbortSignal.any([mine.signal, AbortSignal.timeout(TIMEOUT_MS)])));
    } catch (error) {
      if (mine.signal.aborted) return;
      failed(error);
    }
    if (!document.hidden) timer = setTimeout(ask, Math.max(0, PERIOD_MS - (performance.now() - began)));
  }

  function stop() {
    clearTimeout(timer);
    asking?.abort();
  }

  document.addEventListener("visibilitychange", () => {
    stop();
    if (!document.hidden) ask();
  });
  if (!document.hidden) ask();
}
