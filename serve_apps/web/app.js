// The page: what is asked for, what is done with the answer. State lives here and nowhere else.

import { Client, Refusal } from "./client.js";
import { Column } from "./column.js";
import { $, count, h, short } from "./dom.js";
import { setUpFinder } from "./finder.js";
import { isChanged, termNames } from "./ranking.js";
import { watchStatus } from "./status.js";

const K = 100; // the most that one answer holds: what the sliders re-rank
const MAX_HISTORY = 1_000;
const MAX_SKIPPED = 1_000;
const NUM_COLOURS = 8;

const client = new Client();
const state = {
  mode: "user",
  userId: "",
  history: [], // items, oldest first; with timestamps where they came from a known user
  skipped: [], // ids
  factors: {},
  held: [],
  bundle: "",
};
const colours = new Map();
const colour = (name) => {
  if (!colours.has(name)) colours.set(name, `term-${colours.size % NUM_COLOURS}`);
  return colours.get(name);
};
const columns = [new Column("A", colour, react), new Column("B", colour, react)];
let asking = null;

// --- asking -------------------------------------------------------------------------------------

function question() {
  const body = { k: K, explain: true };
  if (state.mode === "user") {
    if (state.userId) body.user_id = state.userId;
  } else {
    const text = $("wish").value;
    if (text.trim()) body.text = text;
    if (state.history.length) body.history = events();
  }
  if (state.skipped.length) body.filters = { exclude_items: state.skipped };
  return body;
}

function events() {
  const timed = state.history.every((item) => item.timestamp !== undefined);
  return state.history.map(({ item_id, timestamp }) => (timed ? { item_id, timestamp } : item_id));
}

/** Ask for the list, and for that of the other bundle; what was asked before is given up. */
async function recommend() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const other = $("compare").value;
  $("columns").setAttribute("aria-busy", "true");
  try {
    const bodies = other ? [question(), { ...question(), bundle: other }] : [question()];
    const answers = await Promise.all(
      bodies.map(async (body) => {
        const start = performance.now();
        return [await client.ask("v1/recommend", body, signal), performance.now() - start];
      }),
    );
    $("trouble").hidden = true;
    answers.forEach(([answer, ms], index) => columns[index].take(answer, ms));
    if (!other) columns[1].clear();
    showWeights();
    draw();
    say(`${count(answers[0][0].items.length, "item")} ${forWhom()}.`);
  } catch (error) {
    trouble(error);
  } finally {
    if (!signal.aborted) $("columns").removeAttribute("aria-busy");
  }
}

function forWhom() {
  if (state.mode === "user") return state.userId ? `for user ${state.userId}` : "for nobody in particular";
  const parts = [];
  if (state.history.length) parts.push(`a history of ${count(state.history.length, "item")}`);
  if ($("wish").value.trim()) parts.push("a wish");
  return parts.length ? `for ${parts.join(" and ")}` : "for nobody in particular";
}

function trouble(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Refusal)) throw error;
  $("trouble").firstElementChild.textContent = error.message;
  $("trouble").hidden = false;
  if (error.status === 401) askForKey(error.message);
}

const say = (text) => ($("said").textContent = text);

// --- the lists ----------------------------------------------------------------------------------

function draw() {
  const shown = Number($("shown").value);
  const [first, second] = columns;
  const both = first.answer && second.answer;
  const other = (column) => both && { label: column.label, list: column.ranked(state.factors) };
  $("columns").classList.toggle("two", Boolean(both));
  for (const [column, against] of [[first, second], [second, first]]) {
    if (column.answer) column.draw(state.factors, shown, other(against));
  }
  $("reset-weights").hidden = !isChanged(state.factors);
}

/** A slider for every term of the answers; those that are there keep their place. */
function showWeights() {
  const names = termNames(columns.map((column) => column.answer).filter(Boolean));
  const shown = [...$("weights").children].map((row) => row.dataset.term);
  if (names.join("\n") === shown.join("\n")) return;
  state.factors = Object.fromEntries(names.map((name) => [name, state.factors[name] ?? 1]));
  $("weights").replaceChildren(...names.map(slider));
}

function slider(name, index) {
  const id = `weight-${index}`;
  const value = h("output", { for: id });
  const input = h("input", { id, type: "range", min: 0, max: 2, step: 0.05 });
  const update = () => {
    value.textContent = `× ${state.factors[name].toFixed(2)}`;
    input.setAttribute("aria-valuetext", `times ${state.factors[name].toFixed(2)}`);
  };
  input.value = state.factors[name];
  update();
  let timer = 0;
  input.addEventListener("input", () => {
    state.factors[name] = Number(input.value);
    update();
    draw();
    clearTimeout(timer);
    timer = setTimeout(sayFirst, 400); // not at every step of a drag
  });
  return h("div", { class: "weight", "data-term": name }, h("label", { for: id }, h("span", { class: `swatch ${colour(name)}` }), name), input, value);
}

function sayFirst() {
  const [first] = columns[0].ranked(state.factors);
  if (first) say(`Re-ranked with your weights; first is ${first.item.title || first.item.item_id}.`);
}

async function react(kind, item, column) {
  const place = [...column.list.children].findIndex((card) => card.dataset.id === item.item_id);
  if (kind === "skip") {
    state.skipped = [...state.skipped.filter((id) => id !== item.item_id), item.item_id].slice(-MAX_SKIPPED);
    showSkipped();
  } else {
    try {
      if (state.mode === "user") await goOnFrom(state.userId);
    } catch (error) {
      trouble(error);
      return;
    }
    add(item);
  }
  await recommend();
  // The card has gone; whoever works with the keyboard goes on with the one that took its place,
  // unless they are somewhere else by now.
  const { activeElement } = document;
  if (activeElement !== document.body && !column.list.contains(activeElement)) return;
  const next = column.list.children[Math.min(place, column.list.children.length - 1)];
  next?.querySelector(`[data-act=${kind}]`)?.focus({ preventScroll: true });
}

// --- for whom -----------------------------------------------------------------------------------

function setMode(mode) {
  state.mode = mode;
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
  $("mode-user").hidden = mode !== "user";
  $("mode-history").hidden = mode !== "history";
}

async function showUser(userId) {
  state.userId = userId;
  $("user-id").value = userId;
  for (const button of $("sample").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button.dataset.user === userId);
  }
  await Promise.all([recommend(), showKnown(userId)]);
}

async function lookUp(userId) {
  const { users } = await client.ask("v1/users", { user_id: userId });
  return users[0] ?? { events: 0, history: [] };
}

async function showKnown(userId) {
  const [summary, list] = $("known").children;
  $("known").hidden = true;
  try {
    const { events, history } = await lookUp(userId);
    if (userId !== state.userId) return; // somebody else was chosen meanwhile
    summary.textContent = `${count(events, "event")}, newest first`;
    list.replaceChildren(...history.slice(-50).reverse().map((item) => h("li", {}, item.title || item.item_id)));
    $("known").hidden = !events;
  } catch (error) {
    trouble(error);
  }
}

/** From here on the history lives in this page: what the endpoint knows of a user is not changed. */
async function goOnFrom(userId) {
  state.history = userId ? (await lookUp(userId)).history : [];
  $("origin").textContent = userId
    ? `Goes on from the history of user ${userId}, in this page only: the endpoint keeps what it knew.`
    : "";
  $("origin").hidden = !userId;
  $("wish").value = "";
  setMode("history");
}

async function showSample() {
  const { users } = await client.ask("v1/users", { k: 12 });
  $("sample").replaceChildren(
    ...users.map(({ user_id, events }) => {
      const attributes = { type: "button", title: user_id, "data-user": user_id, "aria-pressed": "false", onclick: () => showUser(user_id) };
      const [number, noun] = count(events, "event").split(" ");
      return h("li", {}, h("button", attributes, h("span", {}, user_id), h("small", {}, number, h("span", { class: "unseen" }, ` ${noun}`))));
    }),
  );
  return users;
}

// --- the history --------------------------------------------------------------------------------

function add(item) {
  const known = state.history.filter((each) => each.item_id !== item.item_id);
  const newest = known.at(-1);
  const { timestamp, ...plain } = item;
  state.history = [...known, newest ? { ...plain, timestamp: newest.timestamp } : plain].slice(-MAX_HISTORY);
  showHistory();
}

function move(index, by) {
  // Times would put the items back into their order.
  const list = state.history.map(({ timestamp, ...item }) => item);
  const [item] = list.splice(index, 1);
  list.splice(index + by, 0, item);
  state.history = list;
  showHistory();
  const row = $("history").querySelector(`[data-id="${CSS.escape(item.item_id)}"]`);
  const [wanted, otherwise] = by > 0 ? ["newer", "older"] : ["older", "newer"];
  const button = row.querySelector(`[data-act=${wanted}]`);
  (button.disabled ? row.querySelector(`[data-act=${otherwise}]`) : button).focus();
  recommend();
}

function remove(index) {
  state.history = state.history.toSpliced(index, 1);
  showHistory();
  const rows = $("history").children;
  const next = rows[Math.min(rows.length - 1, rows.length - index)];
  (next?.querySelector("[data-act=remove]") ?? $("search")).focus();
  recommend();
}

function showHistory() {
  const last = state.history.length - 1;
  const rows = state.history.map((item, index) => {
    const title = item.title || item.item_id;
    const button = (act, sign, text, onclick, disabled = false) =>
      h("button", { type: "button", class: "quiet small", "data-act": act, "aria-label": `${text} ${title}`, title: text, disabled, onclick }, sign);
    return h(
      "li",
      { "data-id": item.item_id },
      h("span", {}, title),
      button("newer", "↑", "Make newer", () => move(index, 1), index === last),
      button("older", "↓", "Make older", () => move(index, -1), index === 0),
      button("remove", "×", "Remove", () => remove(index)),
    );
  });
  $("history").replaceChildren(...rows.reverse());
  $("clear-history").hidden = !rows.length;
}

function showSkipped() {
  $("skipped").hidden = !state.skipped.length;
  $("skipped").firstElementChild.textContent = `${count(state.skipped.length, "item")} skipped`;
}

// --- the endpoint -------------------------------------------------------------------------------

function tellStatus(status) {
  if (status.bundle === state.bundle && status.held.join() === state.held.join()) return;
  [state.bundle, state.held] = [status.bundle, status.held];
  const others = status.held.filter((bundle) => bundle !== status.bundle);
  const chosen = $("compare").value;
  $("compare").replaceChildren(
    h("option", { value: "" }, "nothing"),
    ...others.map((bundle) => h("option", { value: bundle }, short(bundle))),
  );
  $("compare").value = others.includes(chosen) ? chosen : "";
  $("compare").disabled = !others.length;
  const hint = others.length
    ? "The same request, answered by another bundle, in a second list"
    : "Only one bundle is loaded: there is nothing to compare it with";
  $("compare").title = hint;
  $("compare-hint").textContent = hint;
  if (chosen && !$("compare").value) recommend();
}

const look = watchStatus(client, tellStatus);

function askForKey(why) {
  $("key-why").textContent = why;
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

async function start() {
  look();
  try {
    const users = await showSample();
    $("trouble").hidden = true;
    if (users.length) await showUser(users[users.length >> 1].user_id);
    else await recommend();
  } catch (error) {
    trouble(error);
  }
}

// --- listening ----------------------------------------------------------------------------------

$("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  showUser($("user-id").value);
});
for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", () => {
    setMode(radio.value);
    recommend();
  });
}
$("wish-form").addEventListener("submit", (event) => {
  event.preventDefault();
  recommend();
});
$("wish").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  recommend();
});
$("clear-history").addEventListener("click", () => {
  state.history = [];
  $("origin").hidden = true;
  showHistory();
  $("search").focus();
  recommend();
});
$("skipped").lastElementChild.addEventListener("click", () => {
  state.skipped = [];
  showSkipped();
  recommend();
});
$("reset-weights").addEventListener("click", () => {
  for (const name of Object.keys(state.factors)) state.factors[name] = 1;
  $("weights").replaceChildren(...Object.keys(state.factors).map(slider));
  draw();
  say("As served.");
  $("weights").querySelector("input").focus();
});
$("shown").addEventListener("change", draw);
$("compare").addEventListener("change", recommend);
$("trouble").lastElementChild.addEventListener("click", () => (columns[0].answer ? recommend() : start()));
$("open-key").addEventListener("click", () => askForKey("This endpoint answers those who have a key."));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  client.key = $("key").value;
  $("key").value = "";
  $("key-dialog").close();
  start();
});
$("theme").addEventListener("change", () => {
  const { value } = $("theme");
  document.documentElement.dataset.theme = value;
  localStorage.setItem("fusionrec-colours", value);
});
$("theme").value = localStorage.getItem("fusionrec-colours") ?? "";
document.documentElement.dataset.theme = $("theme").value;

setUpFinder(
  async (query, signal) => (await client.ask("v1/items", { query, k: 8 }, signal)).items,
  (item) => {
    add(item);
    recommend();
  },
  trouble,
);
$("columns").append(...columns.map((column) => column.root));
showHistory();
start();
