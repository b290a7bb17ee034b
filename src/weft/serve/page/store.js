// Conversations and settings in the browser's own storage, each conversation under a key of its own so that two tabs do not overwrite
// one another's. Where storage is forbidden they live as long as the page.

const PREFIX = "weft.chat.";
const ROLES = ["user", "assistant"];

export class Store {
  constructor(warn) {
    this.warn = warn;
    this.storage = usable() ? localStorage : memory();
    this.lasting = this.storage === globalThis.localStorage;
  }

  // Every conversation, the one used last first.
  chats() {
    const found = [];
    for (let i = 0; i < this.storage.length; i++) {
      const key = this.storage.key(i);
      const chat = key.startsWith(PREFIX) ? parse(this.storage.getItem(key)) : null;
      if (isChat(chat)) found.push(chat);
    }
    return found.sort((a, b) => b.updated - a.updated);
  }

  chat(id) {
    const chat = parse(this.storage.getItem(PREFIX + id));
    return isChat(chat) ? chat : null;
  }

  save(chat) {
    chat.updated = Date.now();
    this.put(chat);
  }

  put(chat) {
    try {
      this.storage.setItem(PREFIX + chat.id, JSON.stringify(chat));
    } catch {
      this.makeRoom(chat);
    }
  }

  // Token probabilities take most of the room; older conversations give theirs up.
  makeRoom(chat) {
    try {
      for (const other of this.chats()) {
        if (other.id !== chat.id) this.storage.setItem(PREFIX + other.id, JSON.stringify(withoutTokens(other)));
      }
      this.storage.setItem(PREFIX + chat.id, JSON.stringify(withoutTokens(chat)));
    } catch {
      this.warn("The browser's storage is full, so this conversation is not kept; export and delete old ones.");
    }
  }

  remove(id) {
    this.storage.removeItem(PREFIX + id);
  }

  setting(name, fallback) {
    const value = parse(this.storage.getItem(`weft.${name}`));
    return value ?? fallback;
  }

  set(name, value) {
    try {
      this.storage.setItem(`weft.${name}`, JSON.stringify(value));
    } catch {
      this.warn("The browser's storage is full, so settings are not kept.");
    }
  }

  exported() {
    return JSON.stringify({ format: "weft-chats", version: 1, chats: this.chats() }, null, 2);
  }

  // Adds the conversations of an exported file; returns how many. Throws Error with a sentence where there are none to be had.
  imported(text) {
    const data = parse(text);
    const chats = Array.isArray(data) ? data : data?.chats;
    if (!Array.isArray(chats)) throw new Error("This file has no conversations; choose one that Export wrote.");
    const sound = chats.map(cleaned).filter(Boolean);
    if (!sound.length) throw new Error("None of the conversations in this file can be read; choose one that Export wrote.");
    for (const chat of sound) this.put(this.chat(chat.id) ? { ...chat, id: newId() } : chat);
    return sound.length;
  }
}

export function newChat(system) {
  return { id: newId(), title: "", created: Date.now(), updated: Date.now(), system, messages: [] };
}

// Not crypto.randomUUID, which pages served without TLS to another machine do not have.
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function isChat(chat) {
  return typeof chat?.id === "string" && Array.isArray(chat.messages);
}

function cleaned(chat) {
  if (!Array.isArray(chat?.messages)) return null;
  const messages = chat.messages.filter((message) => ROLES.includes(message?.role) && typeof message.content === "string");
  if (!messages.length) return null;
  const kept = messages.map(({ role, content, tokens, stats }) => ({ role, content, ...goodTokens(tokens), ...goodStats(stats) }));
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  return {
    id: /^[\w-]{1,64}$/.test(chat.id) ? chat.id : newId(),
    title: typeof chat.title === "string" ? chat.title.slice(0, 200) : "",
    created: time(chat.created),
    updated: time(chat.updated),
    system: typeof chat.system === "string" ? chat.system : "",
    messages: kept,
  };
}

function goodTokens(tokens) {
  const pair = (entry) => Array.isArray(entry) && typeof entry[0] === "string" && Number.isFinite(entry[1]);
  const good = Array.isArray(tokens) && tokens.every((entry) => pair(entry) && Array.isArray(entry[2]) && entry[2].every(pair));
  return good ? { tokens } : {};
}

function goodStats(stats) {
  const names = ["count", "first", "rate"];
  if (!stats || !names.every((name) => stats[name] === null || Number.isFinite(stats[name]))) return {};
  return { stats: { ...Object.fromEntries(names.map((name) => [name, stats[name]])), reason: String(stats.reason).slice(0, 20) } };
}

function withoutTokens(chat) {
  return { ...chat, messages: chat.messages.map(({ tokens, ...rest }) => rest) };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function usable() {
  try {
    localStorage.setItem("weft.probe", "1");
    localStorage.removeItem("weft.probe");
    return true;
  } catch {
    return false;
  }
}

function memory() {
  const map = new Map();
  return {
    get length() {
      return map.size;
    },
    key: (i) => [...map.keys()][i],
    getItem: (key) => map.get(key) ?? null,
    setItem: (key, value) => map.set(key, value),
    removeItem: (key) => map.delete(key),
  };
}
