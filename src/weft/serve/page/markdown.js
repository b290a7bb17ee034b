// A small, safe part of Markdown as DOM nodes. Text becomes text nodes and nothing is ever parsed as HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const INLINE =
  /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|\*(?=[^\s*])([^*]*[^\s*])\*|(?<!\w)_(?=[^\s_])([^_]*[^\s_])_(?!\w)|\[([^\][]*)\]\((https?:\/\/[^\s()]+)\)|(https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?])/;

// The nodes of a text.
export function render(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0));
  return fragment;
}

function blocks(lines, depth) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [node, next] = block(lines, at, depth);
    nodes.push(node);
    at = next;
  }
  return nodes;
}

function block(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return codeBlock(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [element(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2])), at + 1];
  if (RULE.test(line)) return [element("hr"), at + 1];
  if (depth < 8) {
    if (QUOTE.test(line)) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
  }
  return paragraph(lines, at, depth);
}

function codeBlock(lines, at, fence) {
  const body = [];
  const close = new RegExp(`^ {0,3}\\${fence[1][0]}{${fence[1].length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) body.push(lines[end++]);
  const copy = element("button", ["Copy"]);
  copy.type = "button";
  copy.dataset.action = "copy-code";
  const head = element("figcaption", [element("span", [fence[2] || "text"]), copy]);
  const pre = element("pre", [element("code", [body.join("\n")])]);
  pre.tabIndex = 0;
  pre.dir = "ltr";
  const figure = element("figure", [head, pre]);
  figure.className = "code";
  return [figure, end + 1];
}

function quote(lines, at, depth) {
  const body = [];
  let end = at;
  for (let match; end < lines.length && (match = QUOTE.exec(lines[end])); end++) body.push(match[1]);
  return [element("blockquote", blocks(body, depth + 1)), end];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const node = element(ordered ? "ol" : "ul");
  if (ordered && parseInt(first[2], 10) !== 1) node.start = parseInt(first[2], 10);
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (!match || match[1].length < indent || match[1].length > indent + 3 || /\d/.test(match[2]) !== ordered || RULE.test(lines[end])) break;
    const [body, next] = itemLines(lines, end, match);
    const children = blocks(body, depth + 1);
    // An item of one paragraph is shown without the paragraph's margins.
    node.append(element("li", children[0]?.tagName === "P" ? [...children[0].childNodes, ...children.slice(1)] : children));
    end = next;
  }
  return [node, end];
}

// The lines that belong to a list item, its own indentation taken away.
function itemLines(lines, at, match) {
  const margin = match[1].length + match[2].length + 1;
  const body = [match[3]];
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    const inner = /^\s*/.exec(line)[0].length;
    const blank = !line.trim();
    const continues = blank ? /^\s/.test(lines[end + 1] ?? "") : inner > match[1].length || (!starts(line) && lines[end - 1].trim());
    if (!continues) break;
    body.push(line.slice(Math.min(inner, margin)));
    end++;
  }
  // Blank lines between two items of the list do not end it.
  let after = end;
  while (after < lines.length && !lines[after].trim()) after++;
  const another = ITEM.exec(lines[after] ?? "");
  return [body, another && another[1].length >= match[1].length ? after : end];
}

function starts(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line));
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !starts(lines[end])) end++;
  return [element("p", inline(lines.slice(at, end).join("\n").trim())), end];
}

function inline(text, depth = 0) {
  const nodes = [];
  let rest = text;
  while (rest) {
    const match = depth < 6 ? INLINE.exec(rest) : null;
    if (!match) break;
    nodes.push(...plain(rest.slice(0, match.index)), inlineNode(match, depth));
    rest = rest.slice(match.index + match[0].length);
  }
  return [...nodes, ...plain(rest)];
}

function inlineNode([whole, , code, strong, star, underscore, label, target, address], depth) {
  if (code !== undefined) return element("code", [code.replace(/\n/g, " ").replace(/^ (.*\S.*) $/, "$1")]);
  if (strong !== undefined) return element("strong", inline(strong, depth + 1));
  if (star !== undefined || underscore !== undefined) return element("em", inline(star ?? underscore, depth + 1));
  const link = element("a", target ? inline(label || target, 6) : [whole]);
  link.href = target ?? address;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

function plain(text) {
  return text.split("\n").flatMap((line, i) => (i ? [element("br"), line] : [line])).filter((part) => part !== "");
}

function element(name, children = []) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}
