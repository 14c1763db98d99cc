// Small helpers for the document.

// h("button.small", { title: "x", onclick }, "text", child): an element.
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key in element && !key.startsWith("aria")) element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

// The container that gradio made for us.
export const place = (id) => $(`#${id} .html-container > div`) || $(`#${id}`);

const SHAPES = {
  plus: "M12 5v14M5 12h14",
  pen: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  again: "M20 12a8 8 0 1 1-2.3-5.7M20 3v5h-5",
  on: "M5 5l8 7-8 7zM17 5v14",
  bin: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  down: "M12 4v12M6 11l6 6 6-6M5 20h14",
  up: "M12 20V6M6 10l6-6 6 6M5 20h14",
  find: "M11 4a7 7 0 1 1 0 14 7 7 0 0 1 0-14zM20 20l-4-4",
  gear: "M4 7h10M18 7h2M16 5v4M4 17h2M10 17h10M8 15v4M4 12h5M13 12h7M11 10v4",
  list: "M4 6h16v12H4zM9 6v12",
  cross: "M6 6l12 12M18 6L6 18",
  check: "M5 12l5 5 9-10",
  file: "M7 3h7l4 4v14H7zM14 3v4h4",
  more: "M6 12h.01M12 12h.01M18 12h.01",
};

export function icon(name) {
  const span = h("span.icon", { "aria-hidden": "true" });
  span.innerHTML =
    `<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round" ` +
    `stroke-linejoin="round"><path d="${SHAPES[name]}"/></svg>`;
  return span;
}

export function iconButton(name, label, onclick, properties = {}) {
  return h("button.icon-only", { type: "button", title: label, "aria-label": label, onclick, ...properties }, icon(name));
}

// Give the reader a file.
export function download(name, text, type) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Ask the reader for a file; gives its text, or null.
export function pickFile(accept) {
  return new Promise((resolve) => {
    const input = h("input", { type: "file", accept, hidden: true });
    input.onchange = () => resolve(input.files[0]?.text() ?? null);
    input.oncancel = () => resolve(null);
    document.body.append(input);
    input.click();
    setTimeout(() => input.remove(), 60000);
  });
}

// A message at the page's edge for some seconds, with a button if there is something to undo.
export function toast(text, action = null, seconds = 8) {
  let shelf = $("#toasts");
  if (!shelf) document.body.append((shelf = h("div", { id: "toasts", role: "status" })));
  const button = action && h("button", { type: "button", onclick: () => { action.run(); remove(); } }, action.label);
  const box = h("div.toast", {}, h("span", {}, text), button);
  const remove = () => box.remove();
  shelf.append(box);
  setTimeout(remove, seconds * 1000);
}
