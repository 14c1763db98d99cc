// The page's conversations and replies. What it shows is made in messages.js, sidebar.js and settings.js.

import { addNode, choose, fullText, newConversation, path, removeNode, touch, turns, versions } from "./conversation.js";
import { $, place, toast } from "./dom.js";
import { readFiles } from "./files.js";
import { showText } from "./markdown.js";
import { MessageTools, items, showFoot, showHead, showTray } from "./messages.js";
import { Gone, Refused, streamReply, waitForServer } from "./reply.js";
import { toEnd } from "./scroll.js";
import { SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { store } from "./store.js";
import { hasText, t } from "./texts.js";

const REDRAW = 80; // milliseconds between two looks of a reply
const KEEP = 1000; // milliseconds after which a reply that grows is kept again

export class Chat {
  conversation = null;
  replies = new Map(); // conversation id -> what ends its reply
  isGone = false;
  editing = null; // id of the message that is being edited
  files = [];
  #filled = { text: "", files: [] };
  #drawn = 0;
  #timer = null;

  begin() {
    window.chat = this; // for gradio's events
    store.load();
    this.settings = new SettingsPanel(this);
    this.sidebar = new Sidebar(this);
    this.tools = new MessageTools(this);
    showHead(this);
    store.addEventListener("change", ({ detail }) => {
      this.sidebar.show();
      if (detail === this.conversation.id && !this.isBusy) this.show();
    });
    store.addEventListener("full", () => this.showEdges());
    $("#message textarea").addEventListener("input", () => this.#keepDraft());
    const id = sessionStorage.getItem("qwen-chat/open");
    this.open(store.conversations.has(id) ? id : null);
  }

  get isBusy() {
    return this.replies.has(this.conversation.id);
  }

  // ---- conversations ----

  // Show a conversation, or a new one.
  open(id) {
    this.conversation = store.conversations.get(id) || newConversation(this.settings.system);
    sessionStorage.setItem("qwen-chat/open", this.conversation.id);
    this.editing = null;
    this.settings.fill(this.conversation.system);
    const draft = store.get(`draft/${id ?? "new"}`, { text: "", files: [] });
    this.files = Array.isArray(draft.files) ? draft.files : [];
    this.fillMessage(String(draft.text ?? ""));
    this.sidebar.show();
    this.show();
    toEnd();
    $("#message textarea").focus({ preventScroll: true });
  }

  // Delete a conversation, which can be undone for a while.
  remove(id) {
    const conversation = store.conversations.get(id);
    this.replies.get(id)?.abort();
    store.remove(id);
    if (this.conversation.id === id) this.open(null);
    const run = () => { store.save(conversation); this.sidebar.show(); };
    toast(t("deleted", { title: conversation.title }), { label: t("undo"), run });
  }

  keep(conversation = this.conversation) {
    const isNew = !store.conversations.has(conversation.id);
    store.save(conversation);
    if (isNew) store.set("draft/new", null);
    this.sidebar.show();
  }

  search() {
    this.sidebar.search();
  }

  // ---- questions ----

  // What gradio's box holds when it is sent; gives what it holds from then on.
  submit({ text }) {
    if (this.isBusy || (!text.trim() && !this.files.length)) return { text, files: [] };
    const files = this.files;
    this.files = [];
    this.ask(text, files);
    return { text: "", files: [] };
  }

  ask(text, files = [], parent = this.conversation.leaf) {
    const question = addNode(this.conversation, parent, "user", text, files.length ? { files } : {});
    store.set(`draft/${this.conversation.id}`, null);
    store.set("draft/new", null);
    this.reply(question);
    toEnd();
  }

  // A new reply to a question, beside those that it has.
  reply(question) {
    const node = addNode(this.conversation, question.id, "assistant", "");
    this.run(this.conversation, node);
  }

  goOn(node) {
    choose(this.conversation, node.id);
    this.conversation.leaf = node.id;
    this.run(this.conversation, node);
  }

  // Write a reply to its end, over restarts of the server.
  async run(conversation, node) {
    if (this.replies.has(conversation.id)) return;
    const ending = new AbortController();
    this.replies.set(conversation.id, ending);
    delete node.error;
    delete node.finish;
    this.keep(conversation);
    this.show();
    try {
      for (let isDone = false; !isDone; ) isDone = await this.#attempt(conversation, node, ending.signal);
    } catch (error) {
      if (error.name === "AbortError") node.finish = "cancelled";
      else if (error instanceof Refused) Object.assign(node, { finish: "error", error: this.sentence(error) });
      else throw error;
    } finally {
      this.replies.delete(conversation.id);
      this.#setGone(false);
      node.place = undefined;
      touch(conversation, node);
      this.keep(conversation);
      this.show();
      this.#announce(node);
    }
  }

  // One connection's worth of a reply; whether that was all of it.
  async #attempt(conversation, node, signal) {
    try {
      let kept = Date.now();
      for await (const progress of streamReply(this.#question(conversation, node), signal)) {
        this.#setGone(false);
        node.text += progress.text || "";
        node.place = progress.place;
        Object.assign(node, {
          tokens: progress.tokens || 0, prompt: progress.prompt_tokens, dropped: progress.dropped_turns || 0,
          rate: progress.rate || node.rate || 0,
        });
        if (progress.finish_reason) node.finish = this.#finish(progress);
        if (Date.now() - kept > KEEP) {
          kept = Date.now();
          touch(conversation, node);
          store.save(conversation);
        }
        this.draw();
      }
      return true;
    } catch (error) {
      if (!(error instanceof Gone)) throw error;
      node.finish = "cut";
      touch(conversation, node);
      store.save(conversation);
      this.#setGone(true);
      this.show();
      await waitForServer(signal);
      delete node.finish;
      return false;
    }
  }

  #finish(progress) {
    const isFull = progress.prompt_tokens + (progress.tokens || 0) >= window.chatInfo.context;
    return progress.finish_reason === "length" && isFull ? "context" : progress.finish_reason;
  }

  #question(conversation, node) {
    const nodes = [];
    for (let each = conversation.nodes[node.parent]; each; each = conversation.nodes[each.parent]) nodes.unshift(each);
    const question = nodes.pop();
    return {
      query: fullText(question), history: turns(nodes), system: conversation.system, prefix: node.text,
      settings: this.settings.values(),
    };
  }

  sentence(error) {
    const key = `error_${error.key}`;
    return error.key && hasText(key) ? t(key, error.values) : error.message;
  }

  stop() {
    this.replies.get(this.conversation.id)?.abort();
  }

  #setGone(isGone) {
    if (isGone === this.isGone) return;
    this.isGone = isGone;
    this.showEdges();
  }

  // ---- messages ----

  edit(id) {
    this.editing = id;
    this.show();
  }

  // An edited message becomes another version, beside the old one.
  saveEdit(node, text, goesOn) {
    this.editing = null;
    if (node.role === "user") {
      if (text.trim() || node.files?.length) this.ask(text, node.files, node.parent);
    } else {
      const version = addNode(this.conversation, node.parent, "assistant", text, { finish: "edited" });
      if (goesOn) this.goOn(version);
      else this.keep();
    }
    this.show();
  }

  editLast() {
    const last = path(this.conversation).findLast((node) => node.role === "user");
    if (!last || this.isBusy) return false;
    this.edit(last.id);
    return true;
  }

  walk(node, step) {
    const all = versions(this.conversation, node);
    choose(this.conversation, all[all.indexOf(node) + step].id);
    this.keep();
    this.show();
  }

  removeMessage(node) {
    const undo = removeNode(this.conversation, node.id);
    this.keep();
    this.show();
    const { conversation } = this;
    const run = () => { undo(); store.save(conversation); this.sidebar.show(); this.show(); };
    toast(t("message_deleted"), { label: t("undo"), run });
  }

  // Esc: out of an edit, out of a drawer, or stop.
  escape() {
    if (this.editing) this.edit(null);
    else if (this.isBusy) this.stop();
    else return this.sidebar.close();
    return true;
  }

  // ---- what is seen ----

  draw() {
    const wait = REDRAW - (Date.now() - this.#drawn);
    if (wait <= 0) this.show();
    else this.#timer ??= setTimeout(() => this.show(), wait);
  }

  show() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#drawn = Date.now();
    this.tools.items = items(this.conversation);
    document.body.classList.toggle("busy", this.isBusy);
    $("#show_messages").click();
    this.tools.refresh();
    this.showEdges();
  }

  showEdges() {
    showTray(this);
    showFoot(this);
  }

  // For gradio's Chatbot.
  shownMessages() {
    const value = this.tools.items.map(({ node }) => ({
      role: node.role, content: [{ type: "text", text: showText(node.text) || "\u200b" }], metadata: {}, options: [],
    }));
    const isDemo = window.chatInfo.name === "demo";
    const examples = t(isDemo ? "examples_demo" : "examples").split("|").map((text) => ({ text }));
    const about = isDemo ? t("demo") : window.chatInfo.raw ? t("raw") : t("about", { name: window.chatInfo.name });
    return { __type__: "update", value, placeholder: `## ${t("empty")}\n\n${about}`, examples };
  }

  filledSettings() {
    return this.settings.filled();
  }

  changeSettings(values) {
    this.settings.change(values);
  }

  fillMessage(text) {
    this.#filled = { text, files: [] };
    $("#fill_message").click();
  }

  filledMessage() {
    return this.#filled;
  }

  // Files that gradio's box has taken in go to the tray, as text; gives what the box holds from then on.
  async takeFiles(value) {
    if (!value?.files?.length) return value;
    const refuse = (name, error) => toast(`${name}: ${error instanceof Refused ? this.sentence(error) : t("gone")}`);
    const read = await readFiles(value.files, refuse);
    this.files.push(...read);
    this.#keepDraft(value.text);
    this.showEdges();
    return { text: $("#message textarea").value, files: [] };
  }

  removeFile(file) {
    this.files = this.files.filter((each) => each !== file);
    this.#keepDraft();
    this.showEdges();
  }

  #keepDraft(text = $("#message textarea").value) {
    const isKept = store.conversations.has(this.conversation.id);
    const draft = text || this.files.length ? { text, files: this.files } : null;
    store.set(`draft/${isKept ? this.conversation.id : "new"}`, draft);
  }

  #announce(node) {
    const region = place("foot").querySelector("[role=status]");
    if (region) region.textContent = node.error || `${t("name_assistant")}: ${node.text.slice(0, 2000)}`;
  }
}
