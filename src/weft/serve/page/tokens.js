// An answer shown token by token, each coloured by its probability, with the alternatives at the pointer or the keyboard's focus.

const tip = document.getElementById("tip");
let described = null;

// Turns the entries of a chunk's logprobs into [text, logprob, [[text, logprob], …]]; a character cut in two goes to its last token.
export class TokenReader {
  constructor() {
    this.decoder = new TextDecoder();
    this.first = true;
  }

  read(entries) {
    return entries.map((entry) => {
      let text = entry.bytes ? this.decoder.decode(Uint8Array.from(entry.bytes), { stream: true }) : entry.token;
      if (this.first) text = text.trimStart();
      this.first = this.first && !text;
      return [text, entry.logprob, (entry.top_logprobs ?? []).map((other) => [other.token, other.logprob])];
    });
  }
}

// Brings a node up to date with a list of tokens that only grows.
export function showTokens(node, tokens) {
  if (node.firstElementChild?.className !== "tokens") {
    const made = document.createElement("p");
    made.className = "tokens";
    made.setAttribute("role", "group");
    made.setAttribute("aria-label", "Tokens with their probabilities; the arrow keys go from one to the next");
    node.replaceChildren(made);
  }
  const group = node.firstElementChild;
  for (const token of tokens.slice(group.children.length)) group.append(span(token, group.children.length === 0));
}

function span(token, reachable) {
  const node = document.createElement("span");
  node.className = "token";
  node.textContent = token[0];
  node.tabIndex = reachable ? 0 : -1;
  node.style.setProperty("--doubt", (1 - Math.exp(token[1])).toFixed(3));
  node.entry = token;
  return node;
}

function describe(node) {
  const [text, logprob, top] = node.entry;
  const rows = top.map(([other, value]) => row(other, value, other === text || value === logprob));
  if (!rows.some((one) => one.classList.contains("chosen"))) rows.push(row(text, logprob, true));
  tip.replaceChildren(...rows);
  tip.hidden = false;
  node.setAttribute("aria-describedby", "tip");
  described = node;
  const place = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(place.left, innerWidth - width - 8));
  const above = place.top - height - 8;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${above > 8 ? above : place.bottom + 8}px`);
}

function row(text, logprob, chosen) {
  const share = Math.exp(logprob);
  const node = document.createElement("div");
  node.className = chosen ? "row chosen" : "row";
  const [word, bar, figure] = ["span", "span", "span"].map((name) => node.appendChild(document.createElement(name)));
  word.className = "word";
  word.textContent = visible(text);
  bar.className = "bar";
  bar.style.setProperty("--share", share.toFixed(4));
  figure.className = "figure";
  figure.textContent = percent(share);
  return node;
}

function visible(text) {
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "∅";
}

function percent(share) {
  if (share > 0.9995) return "100%";
  return share >= 0.001 ? `${(100 * share).toFixed(1)}%` : "<0.1%";
}

export function hideTip() {
  tip.hidden = true;
  described?.removeAttribute("aria-describedby");
  described = null;
}

function move(from, key) {
  const all = from.parentElement.children;
  const at = [...all].indexOf(from);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[key];
  if (to === undefined || !all[to]) return to !== undefined;
  from.tabIndex = -1;
  all[to].tabIndex = 0;
  all[to].focus();
  return true;
}

// One set of listeners for all answers inside `root`.
export function watchTokens(root) {
  const token = (event) => event.target.closest?.(".token");
  root.addEventListener("pointerover", (event) => (token(event) ? describe(token(event)) : hideTip()));
  root.addEventListener("pointerleave", hideTip);
  root.addEventListener("focusin", (event) => (token(event) ? describe(token(event)) : hideTip()));
  root.addEventListener("focusout", hideTip);
  root.addEventListener("click", (event) => token(event)?.focus());
  root.addEventListener("keydown", (event) => token(event) && move(token(event), event.key) && event.preventDefault());
  document.getElementById("log").addEventListener("scroll", hideTip, { passive: true });
}
