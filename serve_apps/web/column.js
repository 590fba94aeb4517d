// One list: what answered, how long it took, and a card for each item.

import { arrange, h, short } from "./dom.js";
import { extent, isChanged, rank, segments, waterfall } from "./ranking.js";

const FALLBACKS = {
  unknown_user: "popular items: the bundle does not know this user",
  empty_request: "popular items: nothing was asked for",
  unknown_items: "popular items: no item of the history is known",
};

const number = (value) => value.toFixed(3);
const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : value.toFixed(0)} ms`;

export class Column {
  /** A list called `label`; `colour(name)` is the class of a term, `react(kind, item)` is told of likes and skips. */
  constructor(label, colour, react) {
    this.label = label;
    this.answer = null;
    this.colour = colour;
    this.react = react;
    this.cards = new Map();
    const id = `column-${label}`;
    this.title = h("h2", { id });
    this.badges = h("ul", { class: "badges" });
    this.summary = h("span");
    this.stages = h("tbody");
    this.list = h("ol", { class: "cards", role: "list", "aria-labelledby": id });
    const head = h("thead", { class: "unseen" }, h("tr", {}, ...["Stage", "When", "Time"].map((t) => h("th", { scope: "col" }, t))));
    this.timing = h(
      "details",
      { class: "timing", open: true },
      h("summary", {}, this.summary),
      h("table", {}, h("caption", { class: "unseen" }, "Stages of this answer, one after the other"), head, this.stages),
    );
    const heading = h("header", { class: "heading" }, this.title, h("div", { role: "status" }, this.badges));
    this.root = h("section", { class: "column", "aria-labelledby": id }, heading, this.timing, this.list);
    this.root.hidden = true;
  }

  /** Take a new answer, which took `ms` from this browser and back. */
  take(answer, ms) {
    this.answer = answer;
    this.cards.clear();
    this.title.replaceChildren(`List ${this.label} `, h("code", { title: answer.bundle }, short(answer.bundle)));
    const badges = answer.degraded.map((stage) => h("li", { class: "badge warn" }, `degraded: without ${stage}`));
    if (answer.fallback) {
      badges.push(h("li", { class: "badge info" }, FALLBACKS[answer.fallback] ?? answer.fallback));
    }
    this.badges.replaceChildren(...badges);
    this.#time(answer.timings_ms, ms);
    this.root.hidden = false;
  }

  /** Show nothing. */
  clear() {
    this.answer = null;
    this.root.hidden = true;
  }

  /** The items in the order of the factors. */
  ranked(factors) {
    return this.answer ? rank(this.answer.items, factors) : [];
  }

  /** Draw the first `shown` items; `other` is the other list's ranking, where there is one. */
  draw(factors, shown, other) {
    const changed = isChanged(factors);
    const ranked = this.ranked(factors).slice(0, shown);
    const places = other && new Map(other.list.map(({ item }, place) => [item.item_id, place + 1]));
    const scale = extent(ranked);
    const elements = ranked.map((entry, place) => {
      const id = entry.item.item_id;
      if (!this.cards.has(id)) this.cards.set(id, this.#card(entry.item));
      const card = this.cards.get(id);
      const remarks = [];
      if (changed && entry.served !== place) remarks.push(moved(entry.served - place));
      if (places) remarks.push(elsewhere(other.label, places.get(id)));
      card.update(entry, place + 1, scale, factors, remarks);
      return card.root;
    });
    if (!elements.length) elements.push(h("li", { class: "empty" }, "Nothing is left to recommend."));
    arrange(this.list, elements);
  }

  #card(item) {
    const title = item.title || item.item_id;
    const place = h("span", { class: "place" });
    const score = h("b", { class: "score" });
    const remarks = h("span", { class: "remarks" });
    const bar = h("div", { class: "bar", role: "img" });
    const table = h("tbody");
    const about = [item.domain && h("span", { class: "chip" }, item.domain), (item.categories ?? []).join(" · ")];
    const button = (kind, text) =>
      h("button", { type: "button", class: "small", "data-act": kind, "aria-label": `${text} ${title}`, onclick: () => this.react(kind, item, this) }, text);
    const columns = ["Source", "Term", "Factor", "Adds"].map((text) => h("th", { scope: "col" }, text));
    const root = h(
      "li",
      { class: "card", "data-id": item.item_id },
      place,
      h("div", { class: "what" }, h("h3", {}, title), h("p", { class: "about" }, ...about.filter(Boolean))),
      h("div", { class: "result" }, score, remarks),
      bar,
      h(
        "details",
        { class: "terms" },
        h("summary", {}, "Terms"),
        h("table", {}, h("caption", { class: "unseen" }, `Terms of the score of ${title}`), h("thead", {}, h("tr", {}, ...columns)), table),
      ),
      h("div", { class: "actions" }, button("like", "Like"), button("skip", "Skip")),
    );
    const update = (entry, at, scale, factors, said) => {
      place.textContent = at;
      score.textContent = number(entry.score);
      score.setAttribute("aria-label", `score ${number(entry.score)}`);
      remarks.replaceChildren(...said);
      bar.setAttribute("aria-label", entry.terms.map(([name, value]) => `${name} ${number(value)}`).join(", "));
      bar.replaceChildren(...segments(entry.terms, scale).map((segment) => this.#segment(segment)));
      table.replaceChildren(...this.#rows(entry, factors));
    };
    return { root, update };
  }

  #segment({ name, value, left, width }) {
    const element = h("span", { class: this.colour(name), title: `${name} ${number(value)}`, "data-term": name });
    element.style.left = `${left}%`;
    element.style.width = `${width}%`;
    return element;
  }

  #rows(entry, factors) {
    const rows = entry.terms.map(([name, value]) => {
      const factor = factors[name] ?? 1;
      const served = entry.item.terms?.[name] ?? entry.item.score;
      const label = h("th", { scope: "row" }, h("span", { class: `swatch ${this.colour(name)}` }), name);
      return h("tr", {}, label, h("td", {}, number(served)), h("td", {}, `× ${factor.toFixed(2)}`), h("td", {}, number(value)));
    });
    const total = [h("th", { scope: "row" }, "Score"), h("td", {}, number(entry.item.score)), h("td"), h("td", {}, number(entry.score))];
    return [...rows, h("tr", { class: "total" }, ...total)];
  }

  #time(timings, ms) {
    const { rows, total } = waterfall(timings);
    this.summary.textContent = `${milliseconds(total)} in the endpoint, ${milliseconds(ms)} to this browser`;
    const lines = rows.map(({ name, start, ms: time }) => {
      const span = h("span");
      span.style.left = `${(100 * start) / (total || 1)}%`;
      span.style.width = `${(100 * time) / (total || 1)}%`;
      return h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "when" }, h("div", { "aria-hidden": "true" }, span)), h("td", {}, milliseconds(time)));
    });
    this.stages.replaceChildren(...lines);
  }
}

function moved(places) {
  const [sign, way] = places > 0 ? ["▲", "up"] : ["▼", "down"];
  const text = `${Math.abs(places)} ${way} from the served order`;
  return h("span", { class: way, title: text }, h("span", { "aria-hidden": "true" }, `${sign}${Math.abs(places)}`), h("span", { class: "unseen" }, text));
}

function elsewhere(label, place) {
  if (place === undefined) return h("span", { class: "only" }, `not in ${label}`);
  return h("span", {}, `#${place} in ${label}`);
}
