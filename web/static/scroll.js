// A reply scrolls along unless the reader has scrolled up; gradio's own button leads back to the end.

import { $ } from "./dom.js";

const NEAR = 48; // pixels from the end that still are the end
let follows = true;
let lastTop = 0;

const box = () => $("#chat .bubble-wrap");

export function toEnd() {
  follows = true;
  const element = box();
  if (element) element.scrollTop = element.scrollHeight;
}

export function followReplies() {
  const sizes = new ResizeObserver(() => { if (follows) toEnd(); });
  let watched = null;
  const watch = () => {
    const element = box();
    const content = $(".message-wrap", element || document);
    if (!element || content === watched) return;
    watched = content;
    sizes.disconnect();
    if (content) sizes.observe(content);
    sizes.observe(element);
    element.onscroll ??= onScroll;
  };
  new MutationObserver(watch).observe($("#chat"), { childList: true, subtree: true });
  watch();
}

function onScroll() {
  const element = box();
  const isNear = element.scrollHeight - element.scrollTop - element.clientHeight < NEAR;
  if (isNear) follows = true;
  else if (element.scrollTop < lastTop) follows = false; // upwards only the reader scrolls
  lastTop = element.scrollTop;
}
