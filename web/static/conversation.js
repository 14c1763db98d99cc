// A conversation: a tree of messages, so that a changed question or a second reply keeps what was there before.
//
// {id, title, renamed, created, updated, system, nodes: {id: node}, leaf, gone: [id]}
// node: {id, parent, role, text, time, version, files: [{name, text, tokens, bytes}]}, and of replies: finish, tokens,
// rate, prompt, dropped, error, steps: [{thought, name, arguments, observation}], raw.

export const makeId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(36)).join("").slice(0, 14);

export function newConversation(system) {
  const now = Date.now();
  return { id: makeId(), title: "", renamed: 0, created: now, updated: now, system, nodes: {}, leaf: null, gone: [] };
}

// The messages from the first to the one that is shown last.
export function path(conversation) {
  const nodes = [];
  for (let node = conversation.nodes[conversation.leaf]; node; node = conversation.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

export function children(conversation, id) {
  const found = Object.values(conversation.nodes).filter((node) => node.parent === id);
  return found.sort((a, b) => a.time - b.time || (a.id < b.id ? -1 : 1));
}

export const versions = (conversation, node) => children(conversation, node.parent);

export function addNode(conversation, parent, role, text, more = {}) {
  const last = children(conversation, parent).at(-1);
  const time = Math.max(Date.now(), last ? last.time + 1 : 0);
  const node = { id: makeId(), parent, role, text, time, version: 1, ...more };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  touch(conversation, node);
  if (role === "user" && !conversation.title) conversation.title = makeTitle(text || more.files?.[0]?.name || "");
  return node;
}

export function touch(conversation, node = null) {
  conversation.updated = Date.now();
  if (node) node.version += 1;
}

// Show a message with what was said last after it.
export function choose(conversation, id) {
  let last = id;
  for (let next; (next = children(conversation, last).at(-1)); ) last = next.id;
  conversation.leaf = last;
}

// Take a message and all that follows it out; gives what puts them back.
export function removeNode(conversation, id) {
  const { parent } = conversation.nodes[id];
  const before = conversation.leaf;
  const taken = [];
  const take = (each) => {
    children(conversation, each).forEach((child) => take(child.id));
    taken.push(conversation.nodes[each]);
    delete conversation.nodes[each];
    conversation.gone.push(each);
  };
  take(id);
  if (!conversation.nodes[conversation.leaf]) {
    const left = children(conversation, parent).at(-1);
    if (left) choose(conversation, left.id);
    else conversation.leaf = parent;
  }
  touch(conversation);
  // They come back under new names: the old ones stay gone, in every tab.
  return () => {
    const names = new Map(taken.map((node) => [node.id, makeId()]));
    const rename = (each) => names.get(each) ?? each;
    for (const node of taken) {
      const back = { ...node, id: rename(node.id), parent: rename(node.parent) };
      conversation.nodes[back.id] = back;
    }
    conversation.leaf = rename(before);
    touch(conversation);
  };
}

// What two tabs know of a conversation, together.
export function merge(mine, stored) {
  mine.gone = [...new Set([...mine.gone, ...stored.gone])];
  for (const node of Object.values(stored.nodes)) {
    const own = mine.nodes[node.id];
    if (!own) mine.nodes[node.id] = node;
    else if (node.version > own.version) Object.assign(own, node);
  }
  mine.gone.forEach((id) => delete mine.nodes[id]);
  if (!mine.nodes[mine.leaf]) mine.leaf = mine.nodes[stored.leaf] ? stored.leaf : null;
  if (stored.renamed > mine.renamed) [mine.title, mine.renamed] = [stored.title, stored.renamed];
  mine.title ||= stored.title;
  mine.updated = Math.max(mine.updated, stored.updated);
}

export function makeTitle(text) {
  const line = text.trim().split("\n")[0].replace(/[#*`_]+/g, "").trim();
  const letters = [...line];
  return letters.length > 60 ? `${letters.slice(0, 59).join("").trim()}…` : line;
}

// A question as the model reads it: attached files first.
export function fullText(node) {
  const files = (node.files || []).map((file) => {
    const fence = "`".repeat(Math.max(3, ...(file.text.match(/`+/g) || []).map((run) => run.length + 1)));
    return `${file.name}:\n${fence}\n${file.text.replace(/\n$/, "")}\n${fence}\n\n`;
  });
  return files.join("") + node.text;
}

// [question, reply] pairs of what is shown, for the model, without replies that failed.
export function turns(nodes) {
  const pairs = [];
  for (let i = 0; i + 1 < nodes.length; i += 1) {
    const [question, reply] = [nodes[i], nodes[i + 1]];
    if (question.role === "user" && reply.role === "assistant" && (reply.text || !reply.error)) {
      pairs.push([fullText(question), reply.text]);
    }
  }
  return pairs;
}
