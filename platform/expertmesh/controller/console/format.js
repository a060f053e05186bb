// Numbers as a person reads them.

export const NOTHING = "–";

export function dollars(usd, digits = 2) {
  if (usd === null || usd === undefined) return NOTHING;
  const places = usd !== 0 && Math.abs(usd) < 10 ** -digits ? digits + 4 : digits;
  const text = Math.abs(usd).toLocaleString("en-US", {
    minimumFractionDigits: digits, maximumFractionDigits: places,
  });
  return usd < 0 ? `-$${text}` : `$${text}`;
}

export function count(value, places = 0) {
  if (value === null || value === undefined) return NOTHING;
  return value.toLocaleString("en-US", { maximumFractionDigits: places });
}

/** A short time: latencies. */
export function latency(seconds) {
  if (seconds === null || seconds === undefined) return NOTHING;
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** A time that passes: ages and waits. */
export function lapse(seconds) {
  if (seconds === null || seconds === undefined) return NOTHING;
  const whole = Math.max(0, seconds);
  if (whole < 10) return `${whole.toFixed(1)} s`;
  if (whole < 120) return `${Math.round(whole)} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h`;
  return `${Math.floor(whole / 86400)} days`;
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
}

export const percent = (share) => `${Math.round(share * 100)} %`;
