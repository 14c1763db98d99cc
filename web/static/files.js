// Text files attached to the next question. Gradio's box takes them in by button, drag and paste; here they are read.

import { $, h, icon, iconButton } from "./dom.js";
import { number, t } from "./texts.js";
import { readFile } from "./reply.js";

export function describeFile(file) {
  return t("file_size", { size: number(Math.max(1, Math.round(file.bytes / 1024))), tokens: number(file.tokens) });
}

export function fileChip(file, onRemove = null) {
  return h(
    "span.chip", { title: file.name }, icon("file"), h("span.name", {}, file.name), h("span.size", {}, describeFile(file)),
    onRemove && iconButton("cross", t("remove_file", { name: file.name }), onRemove),
  );
}

// Read what gradio has taken in; `refuse` is told of what is no text.
export async function readFiles(files, refuse) {
  const read = [];
  for (const file of files) {
    const name = file.orig_name || "file";
    try {
      read.push({ name, ...(await readFile(file.path)) });
    } catch (error) {
      refuse(name, error);
    }
  }
  return read;
}

// Gradio's box takes pasted pictures alone: give it other files too, as if they had been chosen.
export function takePastedFiles() {
  $("#message textarea").addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files || [])].filter((file) => !file.type.startsWith("image/"));
    const input = $("#message input[type=file]");
    if (!files.length || !input) return;
    event.preventDefault();
    const chosen = new DataTransfer();
    files.forEach((file) => chosen.items.add(file));
    input.files = chosen.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
}
