// Starts the page once gradio has put its parts there.

import { Chat } from "./app.js";
import { followReplies } from "./scroll.js";
import { listenToKeys } from "./keys.js";
import { takePastedFiles } from "./files.js";

export function start() {
  const chat = new Chat();
  window.chat = chat;
  chat.begin();
  listenToKeys(chat);
  followReplies();
  takePastedFiles();
}
