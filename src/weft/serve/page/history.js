// The list of conversations: open, rename, delete, export, import.

import { at, renameIn, showHistory, titleOf, toast } from "./view.js";

export class History {
  // `page` has `chat`, the one that is open, and the functions `open(chat)`, `begin()` and `drop()`.
  constructor(store, page) {
    this.store = store;
    this.page = page;
    at("history").addEventListener("click", (event) => this.act(event.target.closest("[data-action]")));
    at("export").addEventListener("click", () => this.exportAll());
    at("import").addEventListener("click", () => at("import-file").click());
    at("import-file").addEventListener("change", () => this.importFile());
    addEventListener("storage", () => this.show());
  }

  show() {
    const { chat } = this.page;
    showHistory(this.store.chats(), chat.id);
    at("title").textContent = titleOf(chat);
    document.title = chat.title ? `${chat.title} – Weft` : "Weft";
  }

  act(button) {
    if (!button) return;
    const { id } = button.closest(".entry").dataset;
    if (button.dataset.action === "rename") this.rename(id);
    else if (button.dataset.action === "delete") this.remove(id);
    else this.page.open(id === this.page.chat.id ? this.page.chat : this.store.chat(id));
  }

  rename(id) {
    const node = [...at("history").children].find((entry) => entry.dataset.id === id);
    const chat = id === this.page.chat.id ? this.page.chat : this.store.chat(id);
    renameIn(node, titleOf(chat), (title) => {
      if (title) {
        chat.title = title;
        this.store.put(chat);
      }
      this.show();
    });
  }

  remove(id) {
    const gone = this.store.chat(id);
    if (!gone) return;
    if (id === this.page.chat.id) {
      this.page.drop();
      this.page.begin();
    }
    this.store.remove(id);
    this.show();
    toast(`Deleted “${titleOf(gone)}”.`, "Undo", () => {
      this.store.put(gone);
      this.show();
    });
  }

  exportAll() {
    const address = URL.createObjectURL(new Blob([this.store.exported()], { type: "application/json" }));
    const link = document.createElement("a");
    link.href = address;
    link.download = `weft-chats-${new Date().toISOString().slice(0, 10)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  async importFile() {
    const [file] = at("import-file").files;
    if (!file) return;
    try {
      const count = this.store.imported(await file.text());
      toast(`Imported ${count} conversation${count === 1 ? "" : "s"}.`);
    } catch (error) {
      toast(error.message);
    }
    at("import-file").value = "";
    this.show();
  }
}
