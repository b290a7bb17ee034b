// The page's one controller: what happens when a person types, clicks or presses a key.

import { Answer } from "./answer.js";
import { ApiError, listModels } from "./api.js";
import { History } from "./history.js";
import { Panels } from "./panels.js";
import { newChat, Store } from "./store.js";
import { watchTokens } from "./tokens.js";
import { announce, at, Conversation, copy, grow, isSend, toast } from "./view.js";

const store = new Store(toast);
const view = new Conversation();
const panels = new Panels(store, settingChanged);
const prompt = at("prompt");
let chat = newChat(store.setting("system", ""));
let answering = null;
const page = {
  get chat() {
    return chat;
  },
  open: (other) => {
    if (other && other !== chat) open(other);
    panels.toggleSide(false);
    prompt.focus();
  },
  begin,
  // What is being written is not to be kept.
  drop: () => {
    if (answering) answering.dropped = true;
  },
};
const history = new History(store, page);

// Conversations.

function open(other) {
  stop();
  chat = other;
  panels.system = chat.system ?? "";
  view.probabilities = panels.probabilities;
  view.show(chat.messages);
  store.set("current", chat.id);
  history.show();
}

function begin() {
  open(newChat(store.setting("system", "")));
  panels.close();
  prompt.focus();
}

function save() {
  store.save(chat);
  history.show();
}

// Asking.

function send(text) {
  if (answering || !text.trim() || refused()) return false;
  view.clearError();
  chat.messages.push({ role: "user", content: text });
  chat.title ||= text.trim().split("\n")[0].slice(0, 60);
  view.append(chat.messages.at(-1), chat.messages.length - 1);
  save();
  answer();
  return true;
}

// Lets the model answer the conversation as it stands.
async function answer() {
  const wanted = panels.probabilities ? { logprobs: true, top_logprobs: 5 } : {};
  const mine = new Answer(chat, { model: at("model").value, ...panels.sampling(), ...wanted }, panels.key, draw);
  answering = mine;
  mine.node = view.append(mine.message, chat.messages.length);
  busy(mine, true);
  try {
    finish(mine, await mine.run());
  } catch (error) {
    finish(mine, error.name === "AbortError" ? "stopped" : "broken");
    if (error.name !== "AbortError") failed(mine.chat, error);
  }
}

// Once a frame at most, however fast tokens come.
function draw(mine) {
  mine.frame ??= requestAnimationFrame(() => {
    mine.frame = undefined;
    if (answering !== mine) return;
    mine.message.stats = mine.stats();
    view.fill(mine.node, mine.message);
  });
}

function finish(mine, reason) {
  answering = null;
  busy(mine, false);
  const { message, node } = mine;
  if (mine.dropped) return;
  if (!message.content) {
    node.remove();
    if (reason === "stop" || reason === "length") toast("The model had nothing to say.");
    return;
  }
  message.stats = mine.stats(reason);
  mine.chat.messages.push(message);
  store.save(mine.chat);
  history.show();
  if (mine.chat !== chat) return;
  view.fill(node, message);
  announce(`The model answered: ${message.content}`);
}

function failed(where, error) {
  if (!(error instanceof ApiError)) console.error(error);
  if (where !== chat) return;
  view.fail(error instanceof ApiError ? error.message : "The answer could not be read; the server may be of another version.");
  if (error.status === 401) {
    panels.toggleSettings(true);
    at("settings-form").elements.key.focus();
  }
}

function stop() {
  answering?.stop();
}

function busy(mine, on) {
  at("send").hidden = on;
  at("stop").hidden = !on;
  at("messages").classList.toggle("busy", on);
  view.waiting(mine.node, on);
  if (on) announce("The model is answering.");
}

// Settings that cannot be used are said, and nothing is asked.
function refused() {
  const mistake = panels.mistake;
  if (mistake) toast(mistake);
  return Boolean(mistake);
}

// Messages that are there already.

function edit(index) {
  if (answering) return;
  const message = chat.messages[index];
  const change = (text) => {
    prompt.focus();
    if (message.role === "assistant") {
      chat.messages[index] = { role: "assistant", content: text };
      save();
      view.show(chat.messages);
    } else if (!refused()) {
      const before = structuredClone(chat.messages);
      chat.messages.length = index;
      view.show(chat.messages);
      send(text);
      offerBack(before, before.length - index - 2);
    }
  };
  view.edit(index, message.content, change, () => prompt.focus());
}

// Has an answer written anew: the one at `index`, or the one that follows the person's message there.
function retry(index) {
  if (answering || refused()) return;
  const kept = chat.messages[index].role === "user" ? index + 1 : index;
  if (!kept) return;
  const before = structuredClone(chat.messages);
  chat.messages.length = kept;
  view.show(chat.messages);
  answer();
  offerBack(before, before.length - kept - 1);
}

// After messages beyond the one that was changed went with it: a way to have them back.
function offerBack(before, count) {
  if (count <= 0) return;
  const changed = chat;
  toast(`${count} later message${count === 1 ? "" : "s"} went with it.`, "Undo", () => {
    if (answering?.chat === changed) page.drop();
    changed.messages = before;
    store.save(changed);
    open(changed);
  });
}

// Settings and models.

function settingChanged(name) {
  if (name === "system") {
    chat.system = panels.system;
    store.set("system", chat.system);
    if (chat.messages.length) store.put(chat);
  } else if (name === "probabilities") {
    view.probabilities = panels.probabilities;
    if (!answering) view.show(chat.messages);
  } else if (name === "key") {
    clearTimeout(settingChanged.waiting);
    settingChanged.waiting = setTimeout(loadModels, 400);
  }
}

async function loadModels() {
  const select = at("model");
  try {
    const names = await listModels(panels.key);
    const wanted = select.value && names.includes(select.value) ? select.value : store.setting("model", names[0]);
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.value = names.includes(wanted) ? wanted : names[0];
    select.disabled = false;
    if (at("messages").querySelector(".error") && !chat.messages.length) view.show([]);
  } catch (error) {
    select.disabled = true;
    failed(chat, error);
  }
}

// Listening.

function actOnMessage(event) {
  const button = event.target.closest("[data-action]");
  const row = button?.closest(".message");
  if (!row) return;
  const index = Number(row.dataset.index);
  const acts = {
    copy: () => copy(chat.messages[index]?.content ?? row.querySelector(".body").textContent, button),
    "copy-code": () => copy(button.closest("figure").querySelector("code").textContent, button),
    edit: () => edit(index),
    retry: () => retry(index),
    again: () => {
      view.clearError();
      if (chat.messages.length) retry(chat.messages.length - 1);
      else loadModels();
    },
  };
  acts[button.dataset.action]?.();
}

function onKey(event) {
  if ((event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    begin();
  } else if (event.key === "Escape" && !event.isComposing) {
    if (answering) stop();
    else if (panels.close()) prompt.focus();
  }
}

function onPromptKey(event) {
  if (isSend(event)) {
    event.preventDefault();
    at("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !prompt.value && !event.isComposing) {
    const last = chat.messages.findLastIndex((message) => message.role === "user");
    if (last < 0 || answering) return;
    event.preventDefault();
    edit(last);
  }
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!send(prompt.value)) return;
  prompt.value = "";
  grow(prompt);
});
prompt.addEventListener("input", () => grow(prompt));
prompt.addEventListener("keydown", onPromptKey);
document.addEventListener("keydown", onKey);
at("messages").addEventListener("click", actOnMessage);
at("starters").addEventListener("click", (event) => event.target.closest("button") && send(event.target.textContent));
at("new-chat").addEventListener("click", begin);
at("stop").addEventListener("click", () => {
  stop();
  prompt.focus();
});
at("model").addEventListener("change", () => store.set("model", at("model").value));
addEventListener("pagehide", () => {
  if (answering?.message.content) store.put({ ...chat, messages: [...chat.messages, { ...answering.message, stats: answering.stats("stopped") }] });
});
watchTokens(at("messages"));
if (!store.lasting) toast("This browser keeps nothing for this page, so conversations end with it.");
open(store.chat(store.setting("current", "")) ?? chat);
loadModels();
if (!matchMedia("(pointer: coarse)").matches) prompt.focus();
