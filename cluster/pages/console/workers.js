// Workers as the page shows them: all kinds in one form, by the node they run on.

/** Roles in the order they are listed: [name in the status, word, two letters]. */
export const ROLES = [
  ["preprocess", "preprocessor", "Pp"],
  ["encode", "encoder", "En"],
  ["colocated", "colocated", "Co"],
  ["prefill", "prefill", "Pf"],
  ["decode", "decode", "De"],
];

/** Every worker of a status: {key, id, short, pool, role, state, node, address, load ...}. */
export function workersOf(status) {
  return [
    ...status.preprocessors.map((one) => ({ ...one, pool: "preprocessor", role: "preprocess", state: "ready" })),
    ...status.encoders.map((one) => ({ ...one, pool: "vision_encoder", role: "encode", state: "ready" })),
    ...status.engines,
  ].map((one) => ({ ...one, key: `${one.pool}/${one.id}/${one.address}`, short: one.id.split("-").at(-1) }));
}

/** [{name, workers}] by node, in the order of their names; workers by pool and id, whatever their role. */
export function byNode(workers) {
  const nodes = new Map();
  for (const worker of workers) {
    if (!nodes.has(worker.node)) nodes.set(worker.node, []);
    nodes.get(worker.node).push(worker);
  }
  const pools = [...new Set(workers.map(({ pool }) => pool))];
  const order = (a, b) => pools.indexOf(a.pool) - pools.indexOf(b.pool) || compare(a.id, b.id);
  return [...nodes].sort(([a], [b]) => compare(a, b)).map(([name, here]) => ({ name, workers: here.sort(order) }));
}

/** Blocks of the KV cache as shares: {used, cached}; cached ones are free and still hold a known prefix. */
export function kvShares({ total_blocks: total, free_blocks: free, cached_blocks: cached }) {
  return total > 0 ? { used: (total - free) / total, cached: cached / total } : { used: 0, cached: 0 };
}

const { compare } = new Intl.Collator("en", { numeric: true });
