// Text of a model to HTML: maths by KaTeX, everything else as it stands.

let katexReady = null;
function loadKatex() {
  katexReady ??= island("katex").then(({ css, js }) => {
    document.head.append(make("style", {}, css));
    document.head.append(make("script", {}, js));  // defines window.katex
  });
  return katexReady;
}

const ENVIRONMENTS = /^\\begin\{((?:align|aligned|equation|gather|gathered|cases|array|[pbvV]?matrix)\*?)\}/;

// [{text, math, display, box}] in order. Single dollars follow pandoc's rule, so that prices stay prices.
function pieces(text) {
  const out = [];
  let plain = 0, i = 0;
  const push = (start, end, math, display, box) => {
    if (start > plain) out.push({ text: text.slice(plain, start) });
    out.push({ text: math, math: true, display, box });
    plain = i = end;
  };
  const until = (open, close, display) => {
    const end = text.indexOf(close, i + open.length);
    if (end < 0) return false;
    push(i, end + close.length, text.slice(i + open.length, end), display);
    return true;
  };
  while (i < text.length) {
    const c = text[i];
    if (c === "$" && text[i + 1] === "$") { if (until("$$", "$$", true)) continue; i += 2; continue; }
    if (c === "$") { const end = closingDollar(text, i); if (end > 0) { push(i, end + 1, text.slice(i + 1, end), false); continue; } }
    else if (c === "\\") {
      if (text.startsWith("\\[", i) && until("\\[", "\\]", true)) continue;
      if (text.startsWith("\\(", i) && until("\\(", "\\)", false)) continue;
      const environment = ENVIRONMENTS.exec(text.slice(i, i + 24));
      if (environment) {
        const close = `\\end{${environment[1]}}`;
        const end = text.indexOf(close, i);
        if (end > 0) { push(i, end + close.length, text.slice(i, end + close.length), true); continue; }
      }
      if (text.startsWith("\\boxed{", i)) {
        const end = closingBrace(text, i + 7);
        if (end > 0) { push(i, end + 1, text.slice(i + 7, end), false, true); continue; }
      }
      i += 2;
      continue;
    }
    i += 1;
  }
  if (plain < text.length) out.push({ text: text.slice(plain) });
  return out;
}

function closingDollar(text, start) {
  if (/\s/.test(text[start + 1] ?? " ")) return -1;
  for (let i = start + 1; i < text.length && i < start + 2000; i++) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "\n" && text[i + 1] === "\n") return -1;
    else if (text[i] === "$") return /\s/.test(text[i - 1]) || /\d/.test(text[i + 1] ?? "") ? -1 : i;
  }
  return -1;
}

function closingBrace(text, start) {
  let depth = 1;
  for (let i = start; i < text.length; i++) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "{") depth += 1;
    else if (text[i] === "}" && --depth === 0) return i;
  }
  return -1;
}

// Untrusted text: KaTeX without \href, \includegraphics and \html*, with bounds on expansion and size.
const KATEX = { throwOnError: true, strict: "ignore", trust: false, maxExpand: 200, maxSize: 20 };
const LONGEST_FORMULA = 5000;

function renderText(target, text) {
  let afterDisplay = false;  // a displayed formula brings its own line break
  for (const piece of pieces(text)) {
    if (!piece.math) {
      target.append(afterDisplay ? piece.text.replace(/^ *\n/, "") : piece.text);
      afterDisplay = false;
      continue;
    }
    afterDisplay = piece.display;
    const holder = make("span", piece.box ? { class: "box" } : {});
    try {
      if (piece.text.length > LONGEST_FORMULA) throw new Error("too long");
      katex.render(piece.text, holder, { ...KATEX, displayMode: piece.display });
    } catch {
      holder.textContent = piece.text;  // no maths that KaTeX knows: shown as the model wrote it
    }
    target.append(holder);
  }
}
