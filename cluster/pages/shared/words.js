// Numbers as people read them.

export function seconds(time) {
  if (time >= 1) return `${time.toFixed(time < 10 ? 2 : 1)} s`;
  const ms = time * 1000;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

/** A count in few characters: 980, 12.3k, 4.56M. */
export function compact(count) {
  if (count < 10_000) return String(count);
  const [size, unit] = count < 1e6 ? [1e3, "k"] : count < 1e9 ? [1e6, "M"] : [1e9, "G"];
  return `${(count / size).toPrecision(3)}${unit}`;
}

/** A share; 100% is said only of all, and 0% of none. */
export function percent(share, digits = 0) {
  const step = 10 ** -digits;
  if (share > 0 && share * 100 < step) return `<${step}%`;
  return `${(share < 1 ? Math.min(share * 100, 100 - step) : 100).toFixed(digits)}%`;
}

export const many = (count, noun) => `${compact(count)} ${noun}${count === 1 ? "" : "s"}`;

/** A time of day, of seconds since 1970. */
export const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB");
