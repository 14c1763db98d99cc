// What this browser keeps: conversations, each under a key of its own so that tabs don't overwrite each other.

import { merge } from "./conversation.js";
import { readConversation } from "./formats.js";

const PREFIX = "qwen-chat/";
const CHAT = `${PREFIX}conversation/`;

export const store = new (class extends EventTarget {
  conversations = new Map();
  isFull = false;

  constructor() {
    super();
    addEventListener("storage", (event) => {
      if (event.key?.startsWith(CHAT)) this.#reread(event.key.slice(CHAT.length));
      if (event.key === null) this.load();
    });
  }

  load() {
    this.conversations.clear();
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith(CHAT)) this.#reread(key.slice(CHAT.length), false);
    }
    this.#tell();
  }

  // Conversations, the last used first.
  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  // Keep a conversation, with what another tab has added to it; whether it could be kept.
  save(conversation) {
    this.conversations.set(conversation.id, conversation);
    const stored = this.#read(conversation.id);
    if (stored) merge(conversation, stored);
    return this.#write(CHAT + conversation.id, JSON.stringify(conversation));
  }

  remove(id) {
    this.conversations.delete(id);
    localStorage.removeItem(CHAT + id);
    this.#write(`${PREFIX}draft/${id}`, null);
    this.isFull = false;
    this.#tell();
  }

  get(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
    } catch {
      return otherwise;
    }
  }

  set(name, value) {
    this.#write(PREFIX + name, value === null ? null : JSON.stringify(value));
  }

  #read(id) {
    try {
      return readConversation(JSON.parse(localStorage.getItem(CHAT + id)));
    } catch {
      return null; // not there, or not ours
    }
  }

  #reread(id, tell = true) {
    const stored = this.#read(id);
    const mine = this.conversations.get(id);
    if (!stored) this.conversations.delete(id);
    else if (mine) merge(mine, stored);
    else this.conversations.set(id, stored);
    if (tell) this.#tell(id);
  }

  #write(key, value) {
    let kept = true;
    try {
      if (value === null) localStorage.removeItem(key);
      else localStorage.setItem(key, value);
    } catch {
      kept = false;
    }
    if (kept === this.isFull && (value !== null || !kept)) {
      this.isFull = !kept;
      this.dispatchEvent(new Event("full"));
    }
    return kept;
  }

  #tell(id = null) {
    this.dispatchEvent(new CustomEvent("change", { detail: id }));
  }
})();
