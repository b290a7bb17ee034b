// One answer on its way: what is asked of the server, what has come, and how fast.

import { streamChat } from "./api.js";
import { TokenReader } from "./tokens.js";

export class Answer {
  // `ask` has the request's fields but for the messages; `changed` is called when more of the answer is there.
  constructor(chat, ask, key, changed) {
    this.chat = chat;
    this.message = { role: "assistant", content: "" };
    this.dropped = false;
    this.stopper = new AbortController();
    this.ask = ask;
    this.key = key;
    this.changed = changed;
    this.pieces = 0;
  }

  // Reads the answer to its end; throws ApiError, or an AbortError after `stop`.
  async run() {
    this.started = performance.now();
    const reader = new TokenReader();
    const body = { ...this.ask, messages: said(this.chat) };
    for await (const chunk of streamChat(body, this.key, this.stopper.signal)) {
      if (chunk.usage) this.count = chunk.usage.completion_tokens;
      const choice = chunk.choices?.[0];
      if (choice) this.take(choice, reader);
    }
    return this.reason ?? "stop";
  }

  take(choice, reader) {
    this.reason = choice.finish_reason ?? this.reason;
    const text = choice.delta?.content ?? "";
    const entries = choice.logprobs?.content ?? [];
    if (!text && !entries.length) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += entries.length || 1;
    this.message.content += text;
    if (entries.length) (this.message.tokens ??= []).push(...reader.read(entries));
    this.changed(this);
  }

  stop() {
    this.stopper.abort();
  }

  // Tokens, seconds to the first one, tokens a second after it, and why it ended.
  stats(reason = "") {
    const count = this.count ?? this.pieces;
    const seconds = (this.last - this.first) / 1000;
    const first = this.first === undefined ? null : (this.first - this.started) / 1000;
    return { count, first, rate: count > 1 && seconds > 0 ? (count - 1) / seconds : null, reason };
  }
}

function said(chat) {
  const system = chat.system?.trim() ? [{ role: "system", content: chat.system }] : [];
  const messages = chat.messages.filter((message) => message.content);
  return [...system, ...messages.map(({ role, content }) => ({ role, content }))];
}
