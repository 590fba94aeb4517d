// What can be computed from the terms of an answer without asking again.

/** The terms of an item; one that came without them has its score as the only one. */
export const termsOf = (item) => item.terms ?? { score: item.score };

/** Names of all terms of some answers, in the order in which they appear. */
export function termNames(answers) {
  const names = new Set();
  for (const answer of answers) {
    for (const item of answer.items) for (const name of Object.keys(termsOf(item))) names.add(name);
  }
  return [...names];
}

/**
 * The items of an answer in the order that the factors give them, each as
 * {item, served, terms: [[name, value × factor], …], score}; `served` counts from 0.
 * Equal scores keep the served order. With no factors, it is the served order.
 */
export function rank(items, factors) {
  const scored = items.map((item, served) => {
    const terms = Object.entries(termsOf(item)).map(([name, value]) => [name, value * (factors[name] ?? 1)]);
    return { item, served, terms, score: terms.reduce((sum, [, value]) => sum + value, 0) };
  });
  if (!isChanged(factors)) return scored;
  return scored.sort((a, b) => b.score - a.score || a.served - b.served);
}

/** Whether any factor is not 1. */
export const isChanged = (factors) => Object.values(factors).some((factor) => factor !== 1);

/** Largest sums of the positive and of the negative terms over some ranked items. */
export function extent(ranked) {
  let [low, high] = [0, 0];
  for (const { terms } of ranked) {
    low = Math.min(low, sum(terms, (value) => Math.min(value, 0)));
    high = Math.max(high, sum(terms, (value) => Math.max(value, 0)));
  }
  return { low, high };
}

const sum = (terms, part) => terms.reduce((total, [, value]) => total + part(value), 0);

/**
 * Where each term's segment lies in a bar over `extent`, in per cent: positive terms go right from
 * zero, negative ones left.
 */
export function segments(terms, { low, high }) {
  const scale = 100 / (high - low || 1);
  let [left, right] = [-low * scale, -low * scale];
  return terms.map(([name, value]) => {
    const width = Math.abs(value) * scale;
    if (value < 0) left -= width;
    const segment = { name, value, left: value < 0 ? left : right, width };
    if (value >= 0) right += width;
    return segment;
  });
}

const STAGES = ["queue", "embed", "retrieve", "rerank"];

/** The stages of an answer one after the other: [{name, start, ms}], and the total that they fill. */
export function waterfall(timings) {
  const { total, ...stages } = timings;
  const known = STAGES.filter((name) => name in stages);
  const names = [...known, ...Object.keys(stages).filter((name) => !known.includes(name))];
  let start = 0;
  const rows = names.map((name) => {
    const row = { name, start, ms: stages[name] };
    start += stages[name];
    return row;
  });
  const rest = (total ?? start) - start;
  if (rest > 0) rows.push({ name: names.length ? "the rest" : "all", start, ms: rest });
  return { rows, total: Math.max(total ?? 0, start) };
}
