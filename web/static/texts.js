// The page's texts in the reader's language.

const response = await fetch(new URL(`texts/${window.chatInfo.language}.json`, import.meta.url));
const table = await response.json();

// t("key", {name: value}): the text with its values filled in.
export function t(key, values = {}) {
  return table[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export const hasText = (key) => key in table;
export const number = (value) => value.toLocaleString(window.chatInfo.language);
