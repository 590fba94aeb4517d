// Finding a title by its words: a combobox as ARIA describes it.

import { $, h } from "./dom.js";

const WAIT_MS = 120;

/** Let the search field find items with `search(query, signal)` and give the chosen one to `choose`. */
export function setUpFinder(search, choose, fail) {
  const [field, list] = [$("search"), $("found")];
  let [items, active, asking, timer] = [[], -1, null, 0];

  const close = () => {
    clearTimeout(timer);
    asking?.abort();
    [items, active] = [[], -1];
    list.hidden = true;
    list.replaceChildren();
    field.setAttribute("aria-expanded", "false");
    field.removeAttribute("aria-activedescendant");
  };

  const take = (item) => {
    field.value = "";
    close();
    choose(item);
  };

  const mark = (index) => {
    active = index;
    [...list.children].forEach((option, at) => option.setAttribute("aria-selected", at === active));
    field.setAttribute("aria-activedescendant", `found-${active}`);
    list.children[active].scrollIntoView({ block: "nearest" });
  };

  const show = (found) => {
    items = found;
    active = -1;
    const options = items.map((item, index) => {
      const about = [item.domain, ...item.categories].filter(Boolean).join(" · ");
      return h(
        "li",
        { role: "option", id: `found-${index}`, "aria-selected": "false", onpointerdown: (event) => event.preventDefault(), onclick: () => take(item) },
        h("span", {}, item.title || item.item_id),
        h("small", {}, about),
      );
    });
    list.replaceChildren(...(options.length ? options : [h("li", { class: "none", role: "presentation" }, "No title has these words")]));
    list.hidden = false;
    field.setAttribute("aria-expanded", "true");
    field.removeAttribute("aria-activedescendant");
  };

  const find = async () => {
    asking = new AbortController();
    try {
      show(await search(field.value, asking.signal));
    } catch (error) {
      if (error.name !== "AbortError") {
        close();
        fail(error);
      }
    }
  };

  field.addEventListener("input", () => {
    clearTimeout(timer);
    asking?.abort();
    if (field.value.trim()) timer = setTimeout(find, WAIT_MS);
    else close();
  });
  field.addEventListener("blur", close);
  field.addEventListener("keydown", (event) => {
    const last = items.length - 1;
    if (event.key === "ArrowDown" && items.length) mark(active < last ? active + 1 : 0);
    else if (event.key === "ArrowUp" && items.length) mark(active > 0 ? active - 1 : last);
    else if (event.key === "Enter" && items.length) take(items[Math.max(active, 0)]);
    else if (event.key === "Escape" && !list.hidden) close();
    else return;
    event.preventDefault();
  });
}
