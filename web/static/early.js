// Before gradio starts: the reader's colours, language and panels, so that nothing changes before their eyes.
{
  const info = window.chatInfo;
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem("qwen-chat/preferences")) || {}; } catch { /* no store: defaults hold */ }

  const known = Object.keys(info.languages);
  const own = (navigator.languages || []).map((name) => name.split("-")[0]).find((name) => known.includes(name));
  info.language = [kept.language, info.language, own].find((name) => known.includes(name)) || "en";
  document.documentElement.lang = info.language;
  Object.defineProperty(navigator, "language", { get: () => info.language });

  const app = document.querySelector("gradio-app");
  if (kept.theme === "light" || kept.theme === "dark") app.setAttribute("theme_mode", kept.theme);
  const dark = kept.theme === "dark" || (kept.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.body.classList.toggle("dark", dark);

  const sidebar = (window.gradio_config?.components || []).find((part) => part.props.elem_id === "conversations");
  if (sidebar) sidebar.props.open = innerWidth > 900 && kept.sidebar !== false;

  window.startChat = async () => (await import(new URL("chat/main.js", document.baseURI))).start();
}
