// The drawers at the sides, the theme, and the settings form.

import { at } from "./view.js";

const WHOLE = ["top_k", "max_completion_tokens", "seed"];
const SAMPLING = ["temperature", "top_p", "min_p", ...WHOLE];
const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };
const narrow = matchMedia("(max-width: 52rem)");
const overlaid = matchMedia("(max-width: 80rem)");

export class Panels {
  // `store` keeps what is set; `changed` is told the name of a field after it changed.
  constructor(store, changed) {
    this.store = store;
    this.form = at("settings-form");
    const kept = store.setting("sampling", {});
    for (const name of SAMPLING) this.form.elements[name].value = kept[name] ?? "";
    this.form.elements.probabilities.checked = store.setting("probabilities", false);
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", (event) => this.keep(event.target.name, changed));
    at("reset-sampling").addEventListener("click", () => {
      for (const name of SAMPLING) this.form.elements[name].value = "";
      this.keep("temperature", changed);
    });
    at("open-settings").addEventListener("click", () => this.toggleSettings());
    at("close-settings").addEventListener("click", () => this.toggleSettings(false));
    at("open-side").addEventListener("click", () => this.toggleSide());
    at("backdrop").addEventListener("click", () => this.close());
    at("theme").addEventListener("click", () => this.nextTheme());
    for (const query of [narrow, overlaid]) query.addEventListener("change", () => this.arrange());
    this.showTheme();
    this.arrange();
  }

  keep(name, changed) {
    if (SAMPLING.includes(name)) {
      const { elements } = this.form;
      const values = SAMPLING.filter((field) => elements[field].value !== "").map((field) => [field, elements[field].value]);
      this.store.set("sampling", Object.fromEntries(values));
    }
    if (name === "probabilities") this.store.set("probabilities", this.probabilities);
    changed(name);
  }

  get probabilities() {
    return this.form.elements.probabilities.checked;
  }

  get key() {
    return this.form.elements.key.value.trim();
  }

  get system() {
    return this.form.elements.system.value;
  }

  set system(text) {
    this.form.elements.system.value = text;
  }

  // The first field whose value cannot be used, in words, or nothing.
  get mistake() {
    const wrong = SAMPLING.map((name) => this.form.elements[name]).find((field) => !field.validity.valid);
    if (!wrong) return "";
    this.toggleSettings(true);
    wrong.focus();
    return `${wrong.closest("label").textContent.trim()}: ${wrong.validationMessage}`;
  }

  // What was set, by the names of the server's fields; what was not is left to the server.
  sampling() {
    const given = SAMPLING.filter((name) => this.form.elements[name].value !== "");
    const number = (name) => Number(this.form.elements[name].value);
    return Object.fromEntries(given.map((name) => [name, WHOLE.includes(name) ? Math.trunc(number(name)) : number(name)]));
  }

  // Drawers.

  toggleSettings(open = at("settings").hidden) {
    if (open && overlaid.matches) this.toggleSide(false);
    const held = at("settings").contains(document.activeElement);
    at("settings").hidden = !open;
    at("open-settings").setAttribute("aria-expanded", String(open));
    if (open) this.form.elements.system.focus({ preventScroll: true });
    else if (held) at("open-settings").focus();
    this.arrange();
  }

  toggleSide(open = !at("side").classList.contains("open")) {
    if (open) this.toggleSettings(false);
    const held = at("side").contains(document.activeElement);
    at("side").classList.toggle("open", open);
    at("open-side").setAttribute("aria-expanded", String(open));
    this.arrange();
    if (open) at("new-chat").focus();
    else if (held && narrow.matches) at("open-side").focus();
  }

  // Closes what lies over the conversation; says whether there was anything.
  close() {
    const settings = !at("settings").hidden;
    const side = narrow.matches && at("side").classList.contains("open");
    if (settings) this.toggleSettings(false);
    if (side) this.toggleSide(false);
    return settings || side;
  }

  // What lies over the conversation makes the rest inert; a closed drawer cannot be tabbed into.
  arrange() {
    const side = narrow.matches && at("side").classList.contains("open");
    const settings = overlaid.matches && !at("settings").hidden;
    at("side").inert = (narrow.matches && !side) || settings;
    document.querySelector(".main").inert = side || settings;
    at("backdrop").hidden = !(side || settings);
  }

  // Theme.

  nextTheme() {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(this.store.setting("theme", "auto")) + 1) % names.length];
    this.store.set("theme", next);
    this.showTheme();
  }

  showTheme() {
    const theme = this.store.setting("theme", "auto");
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    at("theme-name").textContent = THEMES[theme] ?? THEMES.auto;
    at("theme").setAttribute("aria-label", `Theme: ${THEMES[theme] ?? THEMES.auto}`);
  }
}
