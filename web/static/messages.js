// What gradio's Chatbot does not have: the row of actions under each message, branches, notes, and the page's edges.

import { path, versions } from "./conversation.js";
import { $, $$, download, h, iconButton, place, toast } from "./dom.js";
import { fileChip } from "./files.js";
import { allToJson } from "./formats.js";
import { store } from "./store.js";
import { number, t } from "./texts.js";

const LONG = { characters: 1500, lines: 16 }; // questions beyond it are folded
const GOES_ON = ["length", "cancelled", "cut", "edited", "error"];

// A row of the chat for each message.
export const items = (conversation) => path(conversation).map((node) => ({ node }));

export class MessageTools {
  items = [];
  #unfolded = new Set();
  #scheduled = false;

  constructor(chat) {
    this.chat = chat;
    new MutationObserver(() => this.refresh()).observe($("#chat"), { childList: true, subtree: true });
    $("#chat").addEventListener("click", ({ target }) => {
      const example = target.closest(".example");
      if (example && !chat.isBusy) chat.ask(example.innerText.trim());
    });
  }

  refresh() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    requestAnimationFrame(() => {
      this.#scheduled = false;
      $$("#chat .message-row").forEach((row, i) => this.items[i] && this.#dress(row, this.items[i].node));
      $("#chat [role=log]")?.setAttribute("aria-live", "off"); // #announce says whole replies
      $("#chat [role=log]")?.setAttribute("tabindex", "0");
    });
  }

  // Give a row its tools, unless it has them already.
  #dress(row, node) {
    const { chat } = this;
    const { conversation } = chat;
    const all = versions(conversation, node);
    const isLast = node.id === conversation.leaf;
    const isWriting = isLast && node.role === "assistant" && chat.isBusy;
    const isEdited = chat.editing === node.id;
    const dropped = this.#droppedBefore();
    const isLong = node.role === "user" && this.#isLong(node);
    const state = [node.id, isLast, all.length, all.indexOf(node), isWriting, chat.isBusy, isEdited, isLong,
      this.#unfolded.has(node.id), dropped === node.id, this.note(node, isWriting), node.text ? 1 : 0];
    const key = JSON.stringify(state);
    if (row.dataset.key === key) return;
    row.dataset.key = key;
    row.classList.toggle("writing", isWriting && !node.text);
    row.classList.toggle("folded", isLong && !this.#unfolded.has(node.id));
    row.classList.toggle("editing", isEdited);
    row.classList.toggle("last", isLast);
    row.classList.toggle("after-window", dropped === node.id);
    row.dataset.window = t("window");
    $$(":scope > .flex-wrap > .tools, :scope > .flex-wrap > .editor, :scope > .flex-wrap > .chips", row).forEach((old) => old.remove());
    const wrap = $(".flex-wrap", row);
    if (node.files) wrap.prepend(h("div.chips", {}, ...node.files.map((file) => fileChip(file))));
    wrap.append(isEdited ? this.#editor(node) : this.#tools(node, all, isWriting, isLong));
  }

  #isLong({ text }) {
    return text.length > LONG.characters || text.split("\n").length > LONG.lines;
  }

  // The first message that the last reply's prompt had; null if it had all.
  #droppedBefore() {
    const last = this.items.at(-1)?.node;
    return last?.dropped ? this.items[last.dropped * 2]?.node.id : null;
  }

  #tools(node, all, isWriting, isLong) {
    const { chat } = this;
    const can = !chat.isBusy;
    const isReply = node.role === "assistant";
    const action = (name, label, run) => can && iconButton(name, t(label), run);
    const place = all.indexOf(node);
    return h(
      "div.tools", {},
      all.length > 1 && h(
        "span.branches", {},
        iconButton("left", t("previous_version"), () => chat.walk(node, -1), { disabled: !can || place === 0 }),
        h("span.count", {}, `${place + 1} / ${all.length}`),
        iconButton("right", t("next_version"), () => chat.walk(node, 1), { disabled: !can || place === all.length - 1 }),
      ),
      h("span.note", node.error ? { role: "alert" } : {}, this.note(node, isWriting)),
      h(
        "span.actions", {},
        isLong && h("button.fold", { type: "button", onclick: () => this.#fold(node.id) },
          t(this.#unfolded.has(node.id) ? "fold" : "unfold")),
        !isWriting && iconButton("copy", t("copy"), () => copy(node.text)),
        action("pen", isReply ? "edit_reply" : "edit", () => chat.edit(node.id)),
        isReply && action("again", "regenerate", () => chat.reply(chat.conversation.nodes[node.parent])),
        isReply && GOES_ON.includes(node.finish ?? "cut") && action("on", "go_on", () => chat.goOn(node)),
        action("bin", "delete_message", () => chat.removeMessage(node)),
      ),
    );
  }

  #fold(id) {
    if (!this.#unfolded.delete(id)) this.#unfolded.add(id);
    this.refresh();
  }

  #editor(node) {
    const { chat } = this;
    const isReply = node.role === "assistant";
    const text = h("textarea", { value: node.text, rows: 3, "aria-label": t(isReply ? "edit_reply" : "edit") });
    const fit = () => { text.style.height = "auto"; text.style.height = `${Math.min(text.scrollHeight + 2, innerHeight / 2)}px`; };
    const save = (goesOn) => chat.saveEdit(node, text.value, goesOn);
    text.addEventListener("input", fit);
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isReply) { event.preventDefault(); save(true); }
    });
    requestAnimationFrame(() => { fit(); text.focus(); });
    return h(
      "div.editor", {}, text,
      h(
        "div.buttons", {},
        h("button", { type: "button", onclick: () => chat.edit(null) }, t("cancel")),
        isReply && h("button", { type: "button", onclick: () => save(false) }, t("save")),
        h("button.primary", { type: "button", onclick: () => save(true) }, t(isReply ? "save_and_go_on" : "send")),
      ),
    );
  }

  // What is to be said about a reply, under it.
  note(node, isWriting) {
    if (node.role === "user") return "";
    if (node.error) return t("error", { message: node.error });
    if (isWriting && !node.tokens) return node.place ? t("waiting", { place: node.place }) : t("thinking");
    const notes = node.tokens ? [t("stats", { tokens: number(node.tokens), rate: (node.rate || 0).toFixed(1) })] : [];
    const finish = isWriting ? "" : node.finish ?? "cut";
    if (["cancelled", "length", "context", "cut", "edited"].includes(finish)) notes.push(t(`finish_${finish}`));
    if (finish === "stop" && !node.text) notes.push(t("no_reply"));
    if (node.dropped) notes.push(t("dropped", { count: node.dropped }));
    return notes.join(" · ");
  }
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast(t("copied"), null, 2);
  } catch {
    toast(t("copy_failed"), null, 4); // no clipboard without https
  }
}

// ---- the page's edges ----

export function showHead(chat) {
  place("head").replaceChildren(
    iconButton("list", t("conversations"), () => chat.sidebar.toggle("conversations")),
    h("h1", {}, window.chatInfo.name),
    iconButton("pen", t("new_chat"), () => chat.open(null)),
    iconButton("gear", t("settings"), () => chat.sidebar.toggle("settings")),
  );
}

// Above the box: what is wrong, and the files that go with the next question.
export function showTray(chat) {
  const parts = [];
  if (chat.isGone) parts.push(h("div.banner", { role: "alert" }, t("gone")));
  if (store.isFull) {
    const save = () => download("chats.json", allToJson(store.list()), "application/json");
    parts.push(h("div.banner", { role: "alert" }, t("full"), h("button", { type: "button", onclick: save }, t("export_all"))));
  }
  if (chat.files.length) {
    parts.push(h("div.chips", {}, ...chat.files.map((file) => fileChip(file, () => chat.removeFile(file)))));
  }
  place("tray").replaceChildren(...parts);
}

// Under the box: how much of the context is used.
export function showFoot(chat) {
  let foot = $(".foot", place("foot"));
  if (!foot) {
    foot = h("div.foot", {}, h("span.gauge"), h("span.hint", {}, t("hint")));
    place("foot").replaceChildren(foot, h("div.unseen", { role: "status" }));
  }
  const last = path(chat.conversation).findLast((node) => node.role === "assistant" && node.prompt);
  const used = last ? last.prompt + last.tokens : 0;
  const { context } = window.chatInfo;
  const meter = h("meter", { min: 0, max: context, value: used, high: context * 0.8, "aria-label": t("context") });
  const text = t("gauge", { used: number(used), context: number(context) });
  $(".gauge", foot).replaceChildren(...(used ? [meter, h("span", {}, text)] : []));
}
