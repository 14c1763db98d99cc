// Text as Markdown that is safe to show: HTML in it is seen instead of run, pictures become links.
//
// The page's sanitiser and its content security policy stand behind this; here it is about seeing what was written.
// What is code is left as it is, but only where there is no doubt that a Markdown parser takes it for code too.

// Around mathematics, in place of $ and \[: marks that gradio is told of and that no text keeps, so that code with
// dollars in it stays code.
const BLOCK = ["\ue000", "\ue001"];
const INLINE = ["\ue002", "\ue003"];
const MARKS = /[\ue000-\ue003]/g;

const FENCE = /^([ \t]*)((?:[-*+]|\d{1,9}[.)])[ \t]+)?(`{3,}|~{3,})([^\n]*)$/;
const MATH = /\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]|\\\((.+?)\\\)|(?<![\\$\w])\$(?![\s$])([^$\n]*?[^\s\\$])\$(?![\w$])/g;

export function showText(text) {
  const shown = [];
  let prose = [];
  const flush = () => {
    if (prose.length) shown.push(showProse(prose.join("\n")));
    prose = [];
  };
  const lines = text.replace(MARKS, "").split("\n");
  for (let i = 0; i < lines.length; i += 1) {
    const end = fenceEnd(lines, i);
    if (end === null) {
      prose.push(lines[i]);
      continue;
    }
    flush();
    shown.push(...lines.slice(i, end + 1));
    i = end;
  }
  flush();
  return shown.join("\n");
}

// The last line of the fenced code that begins at a line; null if none does.
function fenceEnd(lines, start) {
  const found = FENCE.exec(lines[start]);
  if (!found || (found[3][0] === "`" && found[4].includes("`"))) return null;
  const indent = found[1].length + (found[2] || "").length;
  // Deep indents are code of another kind or belong to lists, where only the parser knows.
  if (indent > 3 && !inList(lines, start)) return null;
  const close = new RegExp(`^[ \\t]*${found[3][0]}{${found[3].length},}[ \\t]*$`);
  for (let i = start + 1; i < lines.length; i += 1) {
    if (indentOf(lines[i]) < indent && lines[i].trim()) return indent ? i - 1 : closesAt(lines, i, close);
    if (close.test(lines[i]) && indentOf(lines[i]) - indent <= 3) return i;
  }
  return lines.length - 1;
}

const closesAt = (lines, i, close) => (close.test(lines[i]) ? i : null);
const indentOf = (line) => line.length - line.trimStart().length;

function inList(lines, start) {
  for (let i = start; i >= 0; i -= 1) if (/^ {0,3}([-*+]|\d{1,9}[.)])\s/.test(lines[i])) return true;
  return false;
}

function showProse(prose) {
  return prose.split(/(\n[ \t]*\n)/).map(showParagraph).join("");
}

function showParagraph(paragraph) {
  const lines = paragraph.split("\n").map(splitSpans);
  const isClear = lines.every((parts) => parts !== null) && !/\\`/.test(paragraph);
  if (!isClear) return escape(paragraph);
  if (lines.every((parts) => parts.length === 1)) return showMath(paragraph);
  return lines.map((parts) => parts.map((part, i) => (i % 2 ? part : showMath(part))).join("")).join("\n");
}

// A line as prose and code spans in turns; null where backticks don't pair on it.
function splitSpans(line) {
  const parts = [];
  let rest = 0;
  const run = /`+/g;
  for (let open; (open = run.exec(line)); ) {
    const close = new RegExp(`(?<!\`)${open[0]}(?!\`)`, "g");
    close.lastIndex = run.lastIndex;
    if (!close.exec(line)) return null;
    parts.push(line.slice(rest, open.index), line.slice(open.index, close.lastIndex));
    rest = run.lastIndex = close.lastIndex;
  }
  return [...parts, line.slice(rest)];
}

function showMath(prose) {
  const shown = [];
  let rest = 0;
  for (const found of prose.matchAll(MATH)) {
    const [display, inline] = [found[1] ?? found[2], found[3] ?? found[4]];
    const [left, right] = display === undefined ? INLINE : BLOCK;
    shown.push(escape(prose.slice(rest, found.index)), left, escapeAll(display ?? inline), right);
    rest = found.index + found[0].length;
  }
  return shown.join("") + escape(prose.slice(rest));
}

const escapeAll = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function escape(prose) {
  return prose
    .replace(/&(?=#?\w+;)/g, "&amp;")
    .replace(/<(?=[A-Za-z/!?])/g, "&lt;")
    .replace(/!(?=\[)/g, "&#33;"); // a picture would be fetched from wherever a reply says
}
