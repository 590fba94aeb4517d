// Making elements. Nothing of an answer is ever read as HTML: titles are whatever a catalogue holds.

/** An element with attributes (`onclick` and the like are listeners) and children. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** The element with an id. */
export const $ = (id) => document.getElementById(id);

/** Put the children of `list` in the order of `elements`, letting those that stay glide there. */
export function arrange(list, elements) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const before = new Map();
  for (const child of list.children) {
    before.set(child, child.getBoundingClientRect().top);
    for (const animation of child.getAnimations()) animation.cancel();
  }
  list.replaceChildren(...elements);
  if (still) return;
  for (const child of elements) {
    if (!before.has(child)) continue;
    const shift = before.get(child) - child.getBoundingClientRect().top;
    if (shift) {
      const from = { transform: `translateY(${shift}px)` };
      child.animate([from, { transform: "none" }], { duration: 180, easing: "ease-out" });
    }
  }
}

/** A number of something, in words: `count(1, "event")` is 1 event. */
export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** The beginning of a bundle's id, which is a hash. */
export const short = (bundle) => (bundle.length > 12 ? `${bundle.slice(0, 12)}…` : bundle);
