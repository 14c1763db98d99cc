// The list of conversations, and the panels that fold.

import { $, download, h, icon, iconButton, pickFile, place, toast } from "./dom.js";
import { allToJson, readConversations, toJson, toMarkdown } from "./formats.js";
import { makeId } from "./conversation.js";
import { askText } from "./keys.js";
import { store } from "./store.js";
import { t } from "./texts.js";

const DAY = 86400000;

export class Sidebar {
  #query = "";

  constructor(chat) {
    this.chat = chat;
    const search = h("input", { type: "search", placeholder: t("search"), "aria-label": t("search") });
    search.addEventListener("input", () => { this.#query = search.value.toLowerCase(); this.show(); });
    this.list = h("nav.list", { "aria-label": t("conversations") });
    place("conversation_list").replaceChildren(
      h("button.new", { type: "button", onclick: () => { chat.open(null); this.close(); } }, icon("plus"), t("new_chat")),
      h("div.search", {}, icon("find"), search), this.list,
      h("div.buttons", {},
        h("button", { type: "button", onclick: () => this.import() }, icon("up"), t("import")),
        h("button", { type: "button", onclick: () => this.exportAll() }, icon("down"), t("export_all"))),
    );
    // Beside an open drawer a tap closes it.
    $("#desk").addEventListener("click", (event) => {
      if (!event.target.closest("#head button") && this.close()) event.stopPropagation();
    }, true);
    for (const [id, label] of [["conversations", t("conversations")], ["settings", t("settings")]]) {
      $(`#${id} .toggle-button`).setAttribute("aria-label", label);
    }
  }

  // Open or close a panel; on a narrow page one at a time.
  toggle(id) {
    $(`#${id} .toggle-button`).click();
    if (id === "conversations") this.chat.settings.prefer({ sidebar: !$("#conversations").classList.contains("open") });
  }

  // Close the drawers of a narrow page; whether one was open.
  close() {
    const open = [...document.querySelectorAll(".sidebar.open")];
    if (innerWidth > 900 || !open.length) return false;
    open.forEach((each) => $(".toggle-button", each).click());
    return true;
  }

  search() {
    if (!$("#conversations").classList.contains("open")) this.toggle("conversations");
    $("#conversation_list input").focus();
  }

  show() {
    const groups = new Map();
    for (const conversation of store.list()) {
      if (!this.#matches(conversation)) continue;
      const label = dayLabel(conversation.updated);
      groups.set(label, [...(groups.get(label) || []), conversation]);
    }
    const parts = [...groups].flatMap(([label, found]) => [h("h2", {}, label), ...found.map((each) => this.#row(each))]);
    this.list.replaceChildren(...(parts.length ? parts : [h("p.none", {}, t(this.#query ? "none_found" : "none"))]));
  }

  #matches({ title, nodes }) {
    const query = this.#query;
    return !query || title.toLowerCase().includes(query)
      || Object.values(nodes).some((node) => node.text.toLowerCase().includes(query));
  }

  #row(conversation) {
    const { chat } = this;
    const { id, title } = conversation;
    const isOpen = id === chat.conversation?.id;
    const open = () => { chat.open(id); this.close(); };
    return h(
      isOpen ? "div.row.open" : "div.row", {},
      h("button.title", { type: "button", onclick: open, title, "aria-current": isOpen ? "page" : null }, title || t("untitled")),
      h("span.actions", {},
        iconButton("pen", t("rename"), () => this.#rename(conversation)),
        iconButton("down", t("export_markdown"), () => this.#markdown(conversation)),
        iconButton("file", t("export_json"), () => download(`${fileName(title)}.json`, toJson(conversation), "application/json")),
        iconButton("bin", t("delete"), () => chat.remove(id))),
    );
  }

  async #rename(conversation) {
    const title = await askText(t("rename"), t("title_label"), conversation.title);
    if (!title) return;
    Object.assign(conversation, { title, renamed: Date.now() });
    store.save(conversation);
    this.show();
  }

  #markdown(conversation) {
    const names = { system: t("name_system"), user: t("name_user"), assistant: t("name_assistant") };
    download(`${fileName(conversation.title)}.md`, toMarkdown(conversation, names), "text/markdown");
  }

  exportAll() {
    download("chats.json", allToJson(store.list()), "application/json");
  }

  async import() {
    const text = await pickFile(".json,application/json");
    if (text !== null) this.importText(text);
  }

  // Take the conversations of a file in; all of them or, with a sentence, none.
  importText(text) {
    try {
      const found = readConversations(text);
      for (const conversation of found) {
        if (store.conversations.has(conversation.id)) conversation.id = makeId();
        store.save(conversation);
      }
      this.show();
      toast(t("imported", { count: found.length }));
      if (found.length === 1) this.chat.open(found[0].id);
    } catch (error) {
      toast(t("import_failed", { what: error.message }));
    }
  }
}

const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "chat";

function dayLabel(time) {
  const days = Math.floor((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / DAY + 0.5);
  if (days <= 0) return t("today");
  if (days === 1) return t("yesterday");
  if (days < 7) return t("this_week");
  return new Date(time).toLocaleDateString(window.chatInfo.language, { year: "numeric", month: "long" });
}
