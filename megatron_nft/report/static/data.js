// Data that stands in the page: gzip in base64 inside script elements, unpacked when it is wanted.

function bytesOf(element) {
  const text = atob(element.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpack(element) {
  const stream = new Blob([bytesOf(element)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

async function island(name) {
  return json(await unpack(document.getElementById(`data-${name}`)));
}

// The page is long: an element far down may not have been parsed yet when it is asked for.
async function elementWhenParsed(id) {
  for (;;) {
    const element = document.getElementById(id);
    if (element && (element.nextElementSibling || document.readyState !== "loading")) return element;
    if (document.readyState !== "loading") throw new Error(`the page is cut off: ${id} is missing`);
    await new Promise((resolve) => setTimeout(resolve, 30));
  }
}

// A function that reads part `number` of the page, and keeps the `limit` parts that were asked for last.
function keeping(limit, read) {
  const kept = new Map();
  return (number) => {
    const part = kept.get(number) ?? read(number);
    kept.delete(number);
    kept.set(number, part);
    if (kept.size > limit) kept.delete(kept.keys().next().value);
    return part;
  };
}

// [{prompt, answer, answers: [{..., ids, engine, gap}]}]; see pack.py for the layout.
const chunk = keeping(40, readChunk);
// [[LaTeX source, tree of its MathML or null]]; see formulas.py.
const formulaBlock = keeping(80, async (number) => json(await unpack(await elementWhenParsed(`formulas-${number}`))));

async function readChunk(number) {
  const raw = await unpack(await elementWhenParsed(`chunk-${number}`));
  const length = new DataView(raw.buffer).getUint32(0, true);
  const groups = json(raw.subarray(4, 4 + length));
  let at = 4 + length;
  const take = (type, n) => {
    const part = new type(raw.slice(at, at + n * type.BYTES_PER_ELEMENT).buffer);
    at += n * type.BYTES_PER_ELEMENT;
    return part;
  };
  for (const group of groups) {
    for (const answer of group.answers) {
      if (!answer.hasTokens) continue;
      answer.ids = take(Uint32Array, answer.tokens);
      answer.engine = take(Uint16Array, answer.tokens);
      answer.gap = take(Int16Array, answer.tokens);
    }
  }
  return groups;
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const tip = {
  show(text, event) {
    const element = document.getElementById("tip");
    element.textContent = text;
    element.hidden = false;
    const { width, height } = element.getBoundingClientRect();
    element.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 6))}px`;
    element.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
  },
  hide() {
    document.getElementById("tip").hidden = true;
  },
};
