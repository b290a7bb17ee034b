// What is on the page for the present conversation and for the list of all of them. Knows nothing of the server or of storage.

import { render } from "./markdown.js";
import { showTokens } from "./tokens.js";

export const at = (id) => document.getElementById(id);
const NAMES = { user: "You said", assistant: "The model answered" };
const REASONS = { length: "cut at the token limit", stopped: "stopped", broken: "broken off" };

function fromTemplate(id) {
  return at(id).content.firstElementChild.cloneNode(true);
}

// Messages.

export class Conversation {
  constructor() {
    this.log = at("log");
    this.list = at("messages");
    this.follow = true;
    this.probabilities = false;
    this.log.addEventListener("scroll", () => (this.follow = this.atEnd()), { passive: true });
  }

  atEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 48;
  }

  toEnd() {
    this.follow = true;
    this.log.scrollTop = this.log.scrollHeight;
  }

  show(messages) {
    this.list.replaceChildren(...messages.map((message, index) => this.row(message, index)));
    at("empty").hidden = messages.length > 0;
    this.toEnd();
  }

  row(message, index) {
    const node = fromTemplate("t-message");
    node.classList.add(message.role);
    node.dataset.index = index;
    node.querySelector(".who").textContent = NAMES[message.role];
    for (const button of node.querySelectorAll("[data-action]")) {
      button.setAttribute("aria-label", `${button.textContent.trim()} message ${index + 1}`);
    }
    this.fill(node, message);
    return node;
  }

  append(message, index) {
    const node = this.row(message, index);
    this.list.append(node);
    at("empty").hidden = true;
    this.toEnd();
    return node;
  }

  fill(node, message) {
    const body = node.querySelector(".body");
    if (message.role === "user") body.textContent = message.content;
    else if (this.probabilities && message.tokens?.length) showTokens(body, message.tokens);
    else body.replaceChildren(render(message.content));
    node.querySelector(".stats").textContent = message.stats ? statsLine(message.stats) : "";
    if (this.follow) this.log.scrollTop = this.log.scrollHeight;
  }

  waiting(node, on) {
    node.classList.toggle("waiting", on);
    node.setAttribute("aria-busy", String(on));
  }

  node(index) {
    return this.list.children[index];
  }

  // An error below the last message, with a way to try again.
  fail(text) {
    this.clearError();
    const node = document.createElement("li");
    node.className = "message error";
    node.setAttribute("role", "alert");
    const words = document.createElement("p");
    words.textContent = text;
    const again = document.createElement("button");
    again.type = "button";
    again.className = "quiet";
    again.dataset.action = "again";
    again.textContent = "Try again";
    node.append(words, again);
    this.list.append(node);
    at("empty").hidden = true;
    this.toEnd();
  }

  clearError() {
    this.list.querySelector(".error")?.remove();
  }

  // Puts an editor in a message's place; `save` and `cancel` are called once, whichever is chosen.
  edit(index, text, save, cancel) {
    const node = this.node(index);
    const editor = fromTemplate("t-editor");
    const area = editor.querySelector("textarea");
    const close = (then) => {
      editor.remove();
      node.classList.remove("editing");
      then();
    };
    area.value = text;
    editor.querySelector(".primary").textContent = node.classList.contains("user") ? "Save and send" : "Save";
    editor.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim()) close(() => save(area.value));
    });
    editor.querySelector("[data-action=cancel]").addEventListener("click", () => close(cancel));
    editor.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close(cancel);
      } else if (isSend(event)) {
        event.preventDefault();
        editor.requestSubmit();
      }
    });
    area.addEventListener("input", () => grow(area));
    node.classList.add("editing");
    node.append(editor);
    grow(area);
    area.focus();
    area.setSelectionRange(text.length, text.length);
  }
}

export function statsLine({ count, first, rate, reason }) {
  const parts = [];
  if (count) parts.push(`${count} token${count === 1 ? "" : "s"}`);
  if (rate) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  if (first !== null) parts.push(`first token after ${first < 10 ? first.toFixed(2) : first.toFixed(0)} s`);
  if (REASONS[reason]) parts.push(REASONS[reason]);
  return parts.join(" · ");
}

export function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

// Makes a text area as high as its text, up to the limit that its style sets.
export function grow(area) {
  area.style.setProperty("height", "auto");
  area.style.setProperty("height", `${area.scrollHeight}px`);
}

// History.

export function showHistory(chats, current) {
  at("history").replaceChildren(
    ...chats.map((chat) => {
      const node = fromTemplate("t-chat");
      const [open, rename, remove] = node.children;
      node.dataset.id = chat.id;
      open.textContent = titleOf(chat);
      rename.setAttribute("aria-label", `Rename “${titleOf(chat)}”`);
      remove.setAttribute("aria-label", `Delete “${titleOf(chat)}”`);
      if (chat.id === current) open.setAttribute("aria-current", "true");
      return node;
    }),
  );
}

export function titleOf(chat) {
  return chat.title || "New chat";
}

// An input in place of a conversation's title; `done` gets the new title, or null.
export function renameIn(node, title, done) {
  const input = document.createElement("input");
  input.className = "rename";
  input.value = title;
  input.maxLength = 200;
  input.setAttribute("aria-label", "New title");
  let open = true;
  const close = (value) => {
    if (open) done(value);
    open = false;
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) close(input.value.trim() || null);
    if (event.key === "Escape") close(null);
    event.stopPropagation();
  });
  input.addEventListener("blur", () => close(input.value.trim() || null));
  node.replaceChildren(input);
  input.focus();
  input.select();
}

// Words for everyone: a line at the bottom, and the same for screen readers.

let fading = 0;

export function toast(text, action = "", act = () => {}) {
  const button = at("toast-action");
  at("toast-text").textContent = text;
  button.textContent = action;
  button.hidden = !action;
  button.onclick = () => {
    at("toast").hidden = true;
    act();
  };
  at("toast").hidden = false;
  clearTimeout(fading);
  fading = setTimeout(() => (at("toast").hidden = true), action ? 9000 : 5000);
}

export function announce(text) {
  at("status").textContent = text;
}

// Copies a text and says so on the button that asked.
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
    const label = button.lastChild;
    const before = label.textContent;
    label.textContent = "Copied";
    setTimeout(() => (label.textContent = before), 1200);
  } catch {
    toast("The browser does not allow copying here; select the text and copy it yourself.");
  }
}
