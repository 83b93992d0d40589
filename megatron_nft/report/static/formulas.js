// Text with its formulas. A text of a chunk is a string, or a list of strings, n for formula n and [n] for it in a box.

const MATHML = "http://www.w3.org/1998/Math/MathML";
const TEXT_ELEMENTS = new Set(["b", "code", "em", "i", "span", "u"]);  // HTML inside of mtext

// [name, {attribute: value} unless there are none, child, ...]; mathml.py has let through nothing that could do harm.
function elementOf([name, ...rest]) {
  const node = TEXT_ELEMENTS.has(name) ? document.createElement(name) : document.createElementNS(MATHML, name);
  for (const part of rest) {
    if (typeof part === "string") node.append(part);
    else if (Array.isArray(part)) node.append(elementOf(part));
    else for (const [key, value] of Object.entries(part)) node.setAttribute(key, value);
  }
  return node;
}

// Appends a text to an element once the formulas that occur in it are unpacked.
async function renderText(target, text, perBlock) {
  const parts = typeof text === "string" ? [text] : text;
  const numbers = parts.filter((part) => typeof part !== "string").flat();
  const blocks = new Map();
  for (const number of numbers) blocks.set(Math.floor(number / perBlock), null);
  await Promise.all([...blocks.keys()].map(async (block) => blocks.set(block, await formulaBlock(block))));
  let afterDisplay = false;  // a displayed formula brings its own line break
  for (const part of parts) {
    if (typeof part === "string") {
      target.append(afterDisplay ? part.replace(/^ *\n?/, "") : part);
      afterDisplay = false;
      continue;
    }
    const number = Array.isArray(part) ? part[0] : part;
    const holder = formula(...blocks.get(Math.floor(number / perBlock))[number % perBlock]);
    if (Array.isArray(part)) holder.classList.add("box");
    afterDisplay = holder.classList.contains("display");
    target.append(holder);
  }
}

// What cannot be shown as maths stands as the model wrote it.
function formula(source, tree) {
  if (tree === null) return make("code", {}, source);
  const math = elementOf(tree);
  return make("span", { class: math.getAttribute("display") === "block" ? "display" : "inline", title: source }, math);
}
