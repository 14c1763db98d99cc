// Conversations and presets as files. What comes in is checked field by field, and only known fields are taken.

import { fullText, makeId, makeTitle, newConversation, path, turns } from "./conversation.js";

const TRANSCRIPT = { format: "qwen-chat", version: 1 }; // the terminal chat's `:save`
const ARCHIVE = { format: "qwen-chats", version: 1 };
const PRESETS = { format: "qwen-presets", version: 1 };
const MOST = 20000; // messages of a conversation
const ID = /^[A-Za-z0-9][A-Za-z0-9-]{0,39}$/; // no name that objects have of themselves, such as __proto__

export class FormatError extends Error {}

const isText = (value) => typeof value === "string" && value.isWellFormed();
const isCount = (value) => Number.isFinite(value) && value >= 0;
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

function need(condition, what) {
  if (!condition) throw new FormatError(what);
}

// ---- out ----

// One conversation, as the terminal chat's `:load` reads it; with its branches for this page.
export function toJson(conversation) {
  const said = turns(path(conversation)).map(([user, assistant]) => ({ user, assistant }));
  return pretty({ ...TRANSCRIPT, system: conversation.system, turns: said, conversation });
}

export const allToJson = (conversations) => pretty({ ...ARCHIVE, conversations });
export const presetsToJson = (presets) => pretty({ ...PRESETS, presets });
const pretty = (value) => `${JSON.stringify(value, null, 2)}\n`;

export function toMarkdown(conversation, names) {
  const parts = [`**${names.system}**\n\n${conversation.system}`];
  for (const node of path(conversation)) parts.push(`**${names[node.role]}**\n\n${fullText(node)}`);
  return `${parts.join("\n\n---\n\n")}\n`;
}

// ---- in ----

// The conversations of a file: one, all of a browser, or the terminal chat's.
export function readConversations(text) {
  const content = parse(text);
  if (content.format === ARCHIVE.format) {
    need(content.version === ARCHIVE.version, "version");
    need(Array.isArray(content.conversations), "conversations");
    return content.conversations.map(readConversation);
  }
  need(content.format === TRANSCRIPT.format, "format");
  need(content.version === TRANSCRIPT.version, "version");
  return [content.conversation === undefined ? readTranscript(content) : readConversation(content.conversation)];
}

export function readPresets(text) {
  const content = parse(text);
  need(content.format === PRESETS.format, "format");
  need(content.version === PRESETS.version, "version");
  need(Array.isArray(content.presets) && content.presets.length <= 200, "presets");
  return content.presets.map(readPreset);
}

function parse(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new FormatError("JSON");
  }
  need(isObject(content), "JSON");
  return content;
}

function readTranscript({ system, turns: said }) {
  need(isText(system), "system");
  need(Array.isArray(said) && said.length * 2 <= MOST, "turns");
  const conversation = newConversation(system);
  let parent = null;
  said.forEach((turn, i) => {
    need(isObject(turn) && isText(turn.user) && isText(turn.assistant), `turns[${i}]`);
    for (const [role, text] of [["user", turn.user], ["assistant", turn.assistant]]) {
      const node = { id: makeId(), parent, role, text, time: conversation.created + i, version: 1 };
      if (role === "assistant") node.finish = "stop";
      conversation.nodes[node.id] = node;
      parent = node.id;
    }
  });
  conversation.leaf = parent;
  conversation.title = makeTitle(said[0]?.user ?? "");
  return conversation;
}

// A conversation from a file or from the store, checked.
export function readConversation(given) {
  need(isObject(given) && ID.test(given.id) && isText(given.id), "conversation.id");
  need(isText(given.title) && given.title.length <= 1000, "title");
  need(isText(given.system), "system");
  need([given.created, given.updated, given.renamed].every(isCount), "created");
  need(isObject(given.nodes) && Object.keys(given.nodes).length <= MOST, "nodes");
  need(Array.isArray(given.gone) && given.gone.every((id) => ID.test(id) && isText(id)), "gone");
  const nodes = {};
  for (const [id, node] of Object.entries(given.nodes)) {
    nodes[id] = readNode(node);
    need(nodes[id].id === id, `nodes.${id}`);
  }
  for (const node of Object.values(nodes)) need(isRooted(nodes, node), `nodes.${node.id}.parent`);
  const leaf = isText(given.leaf) && Object.hasOwn(nodes, given.leaf) ? given.leaf : null;
  const { id, title, system, created, updated, renamed, gone } = given;
  return { id, title, system, created, updated, renamed, nodes, leaf, gone: [...gone] };
}

function isRooted(nodes, node) {
  const seen = new Set();
  let each = node;
  while (each.parent !== null) {
    if (seen.has(each.id) || !Object.hasOwn(nodes, each.parent)) return false;
    seen.add(each.id);
    each = nodes[each.parent];
  }
  return true;
}

const FINISHES = ["stop", "stop_word", "length", "context", "cancelled", "cut", "edited", "tool", "error"];
const NUMBERS = ["tokens", "rate", "prompt", "dropped"];

function readNode(given) {
  need(isObject(given) && isText(given.id) && ID.test(given.id), "nodes");
  const where = `nodes.${given.id}`;
  need(given.parent === null || (isText(given.parent) && ID.test(given.parent)), `${where}.parent`);
  need(given.role === "user" || given.role === "assistant", `${where}.role`);
  need(isText(given.text), `${where}.text`);
  need(isCount(given.time) && isCount(given.version), `${where}.time`);
  const { id, parent, role, text, time, version } = given;
  const node = { id, parent, role, text, time, version };
  if (given.files !== undefined) node.files = readFiles(given.files, where);
  if (given.steps !== undefined) node.steps = readSteps(given.steps, where);
  if (given.finish !== undefined) {
    need(FINISHES.includes(given.finish), `${where}.finish`);
    node.finish = given.finish;
  }
  for (const name of NUMBERS) {
    if (given[name] === undefined) continue;
    need(isCount(given[name]), `${where}.${name}`);
    node[name] = given[name];
  }
  for (const name of ["error", "raw"]) {
    if (given[name] === undefined || given[name] === null) continue;
    need(isText(given[name]), `${where}.${name}`);
    node[name] = given[name];
  }
  return node;
}

function readFiles(given, where) {
  need(Array.isArray(given), `${where}.files`);
  return given.map((file) => {
    need(isObject(file) && isText(file.name) && isText(file.text), `${where}.files`);
    need(isCount(file.tokens) && isCount(file.bytes), `${where}.files`);
    return { name: file.name, text: file.text, tokens: file.tokens, bytes: file.bytes };
  });
}

function readSteps(given, where) {
  need(Array.isArray(given), `${where}.steps`);
  return given.map((step) => {
    need(isObject(step) && [step.thought, step.name, step.arguments].every(isText), `${where}.steps`);
    need(step.observation === null || isText(step.observation), `${where}.steps`);
    return { thought: step.thought, name: step.name, arguments: step.arguments, observation: step.observation };
  });
}

export const RANGES = {
  temperature: [0, 2], top_p: [0.05, 1], top_k: [0, 200], repetition_penalty: [1, 2], max_new_tokens: [1, 1e6],
};

function readPreset(given) {
  need(isObject(given) && isText(given.name) && given.name.trim() && given.name.length <= 100, "presets.name");
  need(isText(given.system), "presets.system");
  need(isObject(given.settings), "presets.settings");
  return { name: given.name.trim(), system: given.system, settings: readSettings(given.settings) };
}

export function readSettings(given) {
  const settings = {};
  for (const [name, [low, high]] of Object.entries(RANGES)) {
    const value = given[name];
    if (value === undefined) continue;
    need(Number.isFinite(value) && value >= low && value <= high, `settings.${name}`);
    settings[name] = value;
  }
  return settings;
}
