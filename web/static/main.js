// Starts the page once gradio has put its parts there.

import { Chat } from "./app.js";
import { followReplies } from "./scroll.js";
import { listenToKeys } from "./keys.js";
import { takePastedFiles } from "./files.js";

const PARTS = [
  "#conversation_list .html-container", "#presets .html-container", "#preferences .html-container", "#settings .toggle-button",
  "#head .html-container", "#tray .html-container", "#foot .html-container", "#message textarea", "#chat [role=log]",
  "#show_messages", "#fill_settings", "#fill_message",
];

export async function start() {
  // On a slow machine gradio says that it is there before all of it is.
  while (!PARTS.every((part) => document.querySelector(part))) await new Promise((resolve) => setTimeout(resolve, 20));
  const chat = new Chat();
  chat.begin();
  listenToKeys(chat);
  followReplies();
  takePastedFiles();
}
