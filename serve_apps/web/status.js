// The state of the endpoint, asked for every few seconds while somebody looks.

import { $, h, short } from "./dom.js";

const EVERY_MS = 5_000;

/** Keep the head of the page up to date; `tell(status)` hears of every answer. */
export function watchStatus(client, tell) {
  let timer = 0;

  const look = async () => {
    clearTimeout(timer);
    if (!document.hidden) {
      try {
        const status = await client.ask("v1/status");
        show(status);
        tell(status);
      } catch (error) {
        $("facts").replaceChildren();
        if (error.status === 401) return; // until there is another key, which the page asks for
        $("facts").append(h("li", { class: "badge warn" }, error.message));
      }
    }
    timer = setTimeout(look, EVERY_MS);
  };

  document.addEventListener("visibilitychange", () => document.hidden || look());
  return look;
}

function show(status) {
  const fact = (name, value, more = {}) => h("li", more, `${name} `, h("b", {}, value));
  const replicas = Object.entries(status.replicas).map(([name, { running, target }]) =>
    fact(name, `${running}/${target}`, {
      class: running < target ? "short" : "",
      title: `${running} replicas running, ${target} wanted`,
    }),
  );
  $("facts").replaceChildren(
    h("li", { title: status.bundle }, "Bundle ", h("code", {}, short(status.bundle))),
    ...replicas,
    fact("Waiting", status.queue),
    ...(status.next ? [h("li", { class: "badge info", title: status.next }, `loading ${short(status.next)}`)] : []),
    ...status.degraded.map((stage) => h("li", { class: "badge warn" }, `${stage} is down`)),
  );
}
