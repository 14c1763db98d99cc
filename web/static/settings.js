// Settings of the generation, presets of them, and what the reader prefers.

import { $, download, h, iconButton, pickFile, place, toast } from "./dom.js";
import { presetsToJson, readPresets, readSettings } from "./formats.js";
import { askText, showKeys } from "./keys.js";
import { store } from "./store.js";
import { t } from "./texts.js";

const NAMES = ["temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"]; // after system, before seed
const SHIPPED = ["default", "brief", "translator", "programmer"];
const SHIPPED_SETTINGS = { translator: { temperature: 0.2, top_p: 0.5 }, programmer: { temperature: 0.2, top_p: 0.8 } };

export class SettingsPanel {
  #settings;
  #seed;

  constructor(chat) {
    this.chat = chat;
    const kept = store.get("settings", {});
    this.system = typeof kept.system === "string" ? kept.system : window.chatInfo.system;
    this.#settings = { ...window.chatInfo.settings, ...safely(() => readSettings(kept.settings || {}), {}) };
    this.#seed = typeof kept.seed === "string" ? kept.seed : "";
    this.shownSystem = this.system;
    this.#showPresets();
    this.#showPreferences();
  }

  // For a request: numbers, and a seed or null.
  values() {
    const seed = this.#seed.trim();
    const { max_new_tokens, ...rest } = this.#settings;
    return {
      ...rest, seed: /^\d{1,15}$/.test(seed) ? Number(seed) : null,
      max_new_tokens: Math.min(max_new_tokens, window.chatInfo.context - 1),
    };
  }

  // Put the values into gradio's inputs.
  fill(system = this.shownSystem) {
    this.shownSystem = system;
    $("#fill_settings").click();
  }

  filled() {
    return [this.shownSystem, ...NAMES.map((name) => this.#settings[name]), this.#seed];
  }

  // What gradio's inputs hold after a change.
  change(values) {
    const system = values[0];
    const read = {};
    NAMES.forEach((name, i) => { read[name] = values[i + 1]; });
    const checked = safely(() => readSettings(read), null);
    if (!checked) return;
    Object.assign(this.#settings, checked);
    this.#seed = values.at(-1) ?? "";
    const { conversation } = this.chat;
    if (conversation && system !== this.shownSystem) {
      this.shownSystem = this.system = conversation.system = system;
      if (conversation.leaf) store.save(conversation);
    }
    store.set("settings", { system: this.system, settings: this.#settings, seed: this.#seed });
  }

  // ---- presets ----

  #presets() {
    const own = safely(() => readPresets(presetsToJson(store.get("presets", []))), []);
    const shipped = SHIPPED.map((name) => ({
      name: t(`preset_${name}`), system: name === "default" ? window.chatInfo.system : t(`preset_${name}_system`),
      settings: { ...window.chatInfo.settings, ...SHIPPED_SETTINGS[name] },
    }));
    return { shipped, own, all: [...shipped, ...own] };
  }

  #showPresets(chosen = "") {
    const { own, all } = this.#presets();
    const choice = h("select", { "aria-label": t("preset"), id: "preset" }, h("option", { value: "" }, t("preset")),
      ...all.map((preset) => h("option", { value: preset.name, selected: preset.name === chosen }, preset.name)));
    choice.onchange = () => this.#use(all.find((preset) => preset.name === choice.value));
    const isOwn = () => own.some((preset) => preset.name === choice.value);
    place("presets").replaceChildren(
      choice,
      h("span.actions", {},
        iconButton("plus", t("preset_save"), () => this.#saveAs()),
        iconButton("bin", t("preset_delete"), () => isOwn() && this.#keep(own.filter((each) => each.name !== choice.value))),
        iconButton("up", t("preset_import"), () => this.#import()),
        iconButton("down", t("preset_export"), () => download("presets.json", presetsToJson(all), "application/json"))),
    );
  }

  #use(preset) {
    if (!preset) return;
    Object.assign(this.#settings, preset.settings);
    this.system = this.chat.conversation.system = preset.system;
    if (this.chat.conversation.leaf) store.save(this.chat.conversation);
    this.fill(preset.system);
  }

  async #saveAs() {
    const name = await askText(t("preset_save"), t("preset_name"));
    if (!name) return;
    const settings = readSettings(this.#settings);
    const own = this.#presets().own.filter((preset) => preset.name !== name);
    this.#keep([...own, { name, system: this.shownSystem, settings }], name);
  }

  #keep(own, chosen = "") {
    store.set("presets", own);
    this.#showPresets(chosen);
  }

  async #import() {
    const text = await pickFile(".json,application/json");
    if (text === null) return;
    try {
      const { own, shipped } = this.#presets();
      const found = readPresets(text).filter((preset) => !shipped.some((each) => each.name === preset.name));
      this.#keep([...own.filter((each) => !found.some((preset) => preset.name === each.name)), ...found]);
      toast(t("presets_imported", { count: found.length }));
    } catch (error) {
      toast(t("import_failed", { what: error.message }));
    }
  }

  // ---- what the reader prefers ----

  prefer(values) {
    store.set("preferences", { ...store.get("preferences", {}), ...values });
  }

  #showPreferences() {
    const kept = store.get("preferences", {});
    const theme = select("theme", t("theme"), { system: t("theme_system"), light: t("light"), dark: t("dark") }, kept.theme || "system");
    theme.onchange = () => {
      this.prefer({ theme: theme.value });
      const isDark = theme.value === "dark" || (theme.value === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
      document.body.classList.toggle("dark", isDark);
    };
    const language = select("language", t("language"), window.chatInfo.languages, window.chatInfo.language);
    language.onchange = () => { this.prefer({ language: language.value }); location.reload(); };
    place("preferences").replaceChildren(
      h("label", {}, h("span", {}, t("theme")), theme), h("label", {}, h("span", {}, t("language")), language),
      h("button", { type: "button", onclick: showKeys }, t("keys")),
    );
  }
}

function select(id, label, options, value) {
  return h("select", { id, "aria-label": label },
    ...Object.entries(options).map(([key, text]) => h("option", { value: key, selected: key === value }, text)));
}

function safely(read, otherwise) {
  try {
    return read();
  } catch {
    return otherwise;
  }
}
