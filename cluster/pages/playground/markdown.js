// The Markdown that models write, as elements: paragraphs, headings, lists, code, bold, italics, links.

import { make } from "../shared/dom.js";

const INLINE = /(`+)([\s\S]+?)\1|\*\*(?=\S)([\s\S]+?)\*\*|\*(?=[^\s*])([^*\n]+)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

/** Elements for a text, which may break off anywhere. */
export function rendered(text) {
  const blocks = [];
  const lines = text.split("\n");
  let paragraph = [];
  const endParagraph = () => {
    if (paragraph.some((line) => line.trim())) blocks.push(make("p", {}, ...inline(paragraph.join("\n").trim())));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    const fence = /^\s*(```+|~~~+)/.exec(line);
    const heading = /^(#{1,6})\s+(.*)/.exec(line);
    if (fence) {
      endParagraph();
      const code = [];
      while (++at < lines.length && !lines[at].trim().startsWith(fence[1])) code.push(lines[at]);
      blocks.push(make("pre", {}, make("code", {}, code.join("\n"))));
    } else if (heading) {
      endParagraph();
      blocks.push(make(`h${Math.min(5, heading[1].length + 2)}`, {}, ...inline(heading[2])));
    } else if (item(line)) {
      endParagraph();
      const kind = item(line).kind;
      const list = make(kind);
      for (let next; at < lines.length && (next = item(lines[at]))?.kind === kind; at++) {
        list.append(make("li", {}, ...inline(next.text)));
      }
      at -= 1;
      blocks.push(list);
    } else if (line.trim() === "") {
      endParagraph();
    } else {
      paragraph.push(line);
    }
  }
  endParagraph();
  return blocks;
}

function item(line) {
  const found = /^\s{0,6}(?:([-*+])|(\d{1,3})[.)])\s+(.*)/.exec(line);
  return found && { kind: found[1] ? "ul" : "ol", text: found[3] };
}

function inline(text) {
  const pieces = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    pieces.push(text.slice(from, found.index));
    const [whole, , code, bold, italic, name, href] = found;
    if (code !== undefined) pieces.push(make("code", {}, code));
    else if (bold !== undefined) pieces.push(make("strong", {}, ...inline(bold)));
    else if (italic !== undefined) pieces.push(make("em", {}, ...inline(italic)));
    else pieces.push(make("a", { href, target: "_blank", rel: "noopener noreferrer" }, name));
    from = found.index + whole.length;
  }
  pieces.push(text.slice(from));
  return pieces.filter((piece) => piece !== "");
}
