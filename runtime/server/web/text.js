// Text of an answer as elements: code blocks, inline code, bold; everything else as it is. No HTML of the model is parsed.

const FENCE = /^```([^\n`]*)\n([\s\S]*?)(?:^```[^\S\n]*(?:\n|$)|$(?![\s\S]))/m;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Text up to each match of the pattern as `plain`, and the match as `special`.
function split(text, pattern, plain, special) {
  const parts = [];
  let match;
  while ((match = pattern.exec(text))) {
    if (match.index) parts.push(plain(text.slice(0, match.index)));
    parts.push(special(match));
    text = text.slice(match.index + match[0].length);
  }
  if (text) parts.push(plain(text));
  return parts;
}

const inline = (match) => (match[1] ? make("code", "inline", match[1]) : make("strong", "", match[2]));

function paragraph(text) {
  const body = make("div", "body");
  body.append(...split(text.replace(/^\n+|\n+$/g, ""), INLINE, (plain) => document.createTextNode(plain), inline));
  return body;
}

function codeBlock(match) {
  const block = make("pre");
  block.append(make("code", "", match[2].replace(/\n$/, "")));
  block.tabIndex = 0;
  block.setAttribute("role", "region");
  block.setAttribute("aria-label", match[1].trim() ? `Code, ${match[1].trim()}` : "Code");
  return block;
}

export const render = (text) => split(text, FENCE, paragraph, codeBlock);

export { make };
