// One answer: its verdict, its text with maths, or its tokens coloured by log-prob.

const LOGPROB_UNIT = 1e-3, GAP_UNIT = 1e-4, NO_TRAINER = -32768;

function answerCard(answer, number, view, matches) {
  const disagree = new Set(Object.values(answer.graders).map((v) => v === "correct")).size > 1;
  const head = make("div", { class: "head" },
    make("b", {}, `#${number}`),
    make("span", { class: `badge ${answer.verdict}` }, answer.verdict),
    make("span", {}, answer.extracted == null ? "no answer read" : `read: ${clip(answer.extracted, 60)}`),
    make("span", {}, `${answer.tokens} tokens`),
    answer.finish === "length" ? make("span", { class: "warn" }, "cut off") : null,
    answer.fate && answer.fate !== "trained" ? make("span", {}, answer.fate.replace("_", " ")) : null,
    answer.version != null ? make("span", {}, `weights ${answer.version}`) : null,
    disagree ? make("span", { class: "warn" }, gradersText(answer.graders)) : null);
  const body = make("div", { class: "body" });
  const card = make("div", { class: `answer${matches ? "" : " out"}` }, head, body);
  card.fill = () => (view.mode === "tokens" && answer.hasTokens ? renderTokens(body, answer, view) : renderText(body, answer.text, view.formulasPerBlock));
  return card;
}

const clip = (text, n) => (text.length > n ? `${text.slice(0, n)}…` : text);
const gradersText = (graders) => Object.entries(graders).map(([name, v]) => `${name}: ${v}`).join(", ");

function renderTokens(body, answer, view) {
  body.classList.add("tokens");
  for (let i = 0; i < answer.tokens; i++) {
    const span = document.createElement("span");
    span.textContent = view.tokens[answer.ids[i]] ?? `⟨${answer.ids[i]}⟩`;
    const paint = tokenColor(answer, i, view);
    if (paint) span.style.background = paint;
    span.dataset.i = i;
    body.append(span);
  }
  body.addEventListener("mousemove", (event) => {
    const i = event.target.dataset?.i;
    if (i === undefined) tip.hide();
    else tip.show(tokenText(answer, +i, view), event);
  });
  body.addEventListener("mouseleave", () => tip.hide());
}

// Ratio: blue where the trainer finds the token likelier than the engine did, red where less likely.
function tokenColor(answer, i, view) {
  if (view.paint === "ratio") {
    if (answer.gap[i] === NO_TRAINER) return null;
    const share = (answer.gap[i] * GAP_UNIT) / view.gapScale;
    const strength = Math.min(1, Math.abs(share)) * 0.75;
    return strength < 0.03 ? null : share > 0 ? `rgba(31,111,235,${strength})` : `rgba(214,64,50,${strength})`;
  }
  const surprise = Math.min(1, (answer.engine[i] * LOGPROB_UNIT) / 4);
  return surprise < 0.03 ? null : `rgba(217,130,14,${surprise * 0.8})`;
}

function tokenText(answer, i, view) {
  const engine = -answer.engine[i] * LOGPROB_UNIT;
  const lines = [`${JSON.stringify(view.tokens[answer.ids[i]] ?? "")}  id ${answer.ids[i]}`,
    `engine log p ${engine.toFixed(3)}  (p ${Math.exp(engine).toFixed(3)})`];
  if (answer.gap[i] === NO_TRAINER) lines.push("trainer: not computed");
  else {
    const gap = answer.gap[i] * GAP_UNIT;
    lines.push(`trainer log p ${(engine + gap).toFixed(3)}`, `ratio trainer / engine ${Math.exp(gap).toFixed(4)}`);
  }
  return lines.join("\n");
}

function colorKey(view) {
  if (view.paint === "ratio") {
    const edge = Math.exp(view.gapScale).toFixed(view.gapScale < 0.1 ? 3 : 2), low = Math.exp(-view.gapScale).toFixed(view.gapScale < 0.1 ? 3 : 2);
    return make("span", { class: "key" }, `ratio trainer / engine ${low}`,
      make("i", { style: "background:linear-gradient(90deg, rgba(214,64,50,.75), transparent, rgba(31,111,235,.75))" }), edge);
  }
  return make("span", { class: "key" }, "p = 1", make("i", { style: "background:linear-gradient(90deg, transparent, rgba(217,130,14,.8))" }), "p ≤ 0.02");
}
