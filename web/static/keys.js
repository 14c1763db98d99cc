// The keyboard. Enter and Shift+Enter are gradio's.

import { $, h } from "./dom.js";
import { t } from "./texts.js";

const KEYS = [
  ["Enter", "key_send"], ["Shift+Enter", "key_break"], ["Esc", "key_stop"], ["↑", "key_edit"],
  ["Ctrl+Shift+O", "key_new"], ["Ctrl+Shift+F", "key_search"], ["?", "key_help"],
];

export function listenToKeys(chat) {
  document.addEventListener("keydown", (event) => {
    const typed = event.target.closest?.("input, textarea, select, [contenteditable]");
    const isMessage = typed?.matches?.("#message textarea");
    const key = event.key.toLowerCase();
    let done = true;
    if (event.isComposing) done = false; // the key belongs to an input method
    else if (event.ctrlKey && event.shiftKey && key === "o") chat.open(null);
    else if (event.ctrlKey && event.shiftKey && key === "f") chat.search();
    else if (key === "escape" && !document.querySelector("dialog[open]")) done = chat.escape();
    else if (key === "arrowup" && isMessage && !typed.value) done = chat.editLast();
    else if (event.key === "?" && (!typed || (isMessage && !typed.value))) showKeys();
    else done = false;
    if (done) event.preventDefault();
  });
}

export function showKeys() {
  const rows = KEYS.map(([key, what]) => h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, key)), h("td", {}, t(what))));
  ask({ title: t("keys"), body: h("table.keys", {}, h("tbody", {}, ...rows)) });
}

// A dialog with a form in it; resolves to true where it is confirmed.
export function ask({ title, body, confirm = null }) {
  return new Promise((resolve) => {
    const close = h("button", { type: "submit", value: "", formNoValidate: true }, confirm ? t("cancel") : t("close"));
    const yes = confirm && h("button.primary", { type: "submit", value: "yes" }, confirm);
    const form = h("form", { method: "dialog" }, h("h2", { id: "dialog_title" }, title), body, h("div.buttons", {}, close, yes));
    const dialog = h("dialog", { "aria-labelledby": "dialog_title" }, form);
    dialog.addEventListener("close", () => { dialog.remove(); resolve(dialog.returnValue === "yes"); });
    // Enter confirms, where it is not a line's end.
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.matches("input") && yes) { event.preventDefault(); yes.click(); }
    });
    document.body.append(dialog);
    dialog.showModal();
    $("input, textarea", dialog)?.focus();
  });
}

// Ask for a line of text; null where the reader does not want to say.
export async function askText(title, label, value = "") {
  const input = h("input", { type: "text", value, required: true, maxLength: 100, "aria-label": label });
  const isGiven = await ask({ title, body: input, confirm: t("ok") });
  return isGiven && input.value.trim() ? input.value.trim() : null;
}
