// Filters, a list of questions that draws only what is in sight, and the opened question.

const ROW = 58;
const DISAGREE = 1, TRUNCATED = 2;

function createBrowser(root, index, tokens) {
  const { groups, answers } = index;
  const n = groups.count.length;
  const start = new Uint32Array(n + 1);  // first answer of each group
  for (let g = 0; g < n; g++) start[g + 1] = start[g] + groups.count[g];
  const state = { step: "", source: "", verdict: "", fate: "", flag: 0, min: 0, max: Infinity, search: "", order: "run" };
  const view = { mode: "maths", paint: "ratio", tokens, gapScale: index.gapScale, formulasPerBlock: index.formulasPerBlock };
  let shown = [];  // group numbers that pass the filters
  let current = -1;

  const lower = groups.text.map((text) => text.toLowerCase());
  const passes = (a) =>
    (state.verdict === "" || answers.verdict[a] === state.verdict) &&
    (state.fate === "" || answers.fate[a] === state.fate) &&
    (state.flag === 0 || (answers.flags[a] & state.flag) !== 0) &&
    answers.length[a] >= state.min && answers.length[a] <= state.max;

  function filter() {
    shown = [];
    let found = 0;
    for (let g = 0; g < n; g++) {
      if (state.step !== "" && groups.step[g] !== state.step) continue;
      if (state.source !== "" && groups.source[g] !== state.source) continue;
      if (state.search && !lower[g].includes(state.search)) continue;
      let hits = 0;
      for (let a = start[g]; a < start[g + 1]; a++) if (passes(a)) hits += 1;
      if (hits) shown.push(g);
      found += hits;
    }
    shown.sort((a, b) => groups.step[a] - groups.step[b] || groups.source[a] - groups.source[b] || groups.number[a] - groups.number[b]);
    if (state.order === "rate") shown.sort((a, b) => groups.rate[a] - groups.rate[b]);
    if (state.order === "newest") shown.reverse();
    const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
    label.textContent = `${count(found, "answer")} to ${count(shown.length, "question")}`;
    list.scrollTop = 0;
    drawList();
    if (!shown.includes(current)) {
      if (shown.length) open(shown[0]);
      else closeAll();
    } else open(current);
  }

  // ---- the list
  const list = make("div", { class: "list", tabindex: "0" });
  const filler = make("div", {});
  list.append(filler);
  const rows = new Map();  // place in `shown` -> element
  list.addEventListener("scroll", drawList, { passive: true });

  function drawList() {
    filler.style.height = `${shown.length * ROW}px`;
    const from = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const to = Math.min(shown.length, Math.ceil((list.scrollTop + (list.clientHeight || 900)) / ROW) + 5);
    for (const [place, element] of rows) {
      if (place < from || place >= to || +element.dataset.group !== shown[place]) {
        element.remove();
        rows.delete(place);
      }
    }
    for (let place = from; place < to; place++) {
      if (!rows.has(place)) {
        const element = row(place);
        rows.set(place, element);
        list.append(element);
      }
      rows.get(place).classList.toggle("on", shown[place] === current);
    }
  }

  function row(place) {
    const g = shown[place];
    const dots = make("div", { class: "dots" });
    for (let a = start[g]; a < start[g + 1]; a++) {
      dots.append(make("i", { class: `${index.verdicts[answers.verdict[a]]}${passes(a) ? "" : " out"}` }));
    }
    const where = groups.step[g] == null ? `question ${groups.number[g]}` : `step ${groups.step[g]} · draw ${groups.number[g]}`;
    return make("div", { class: "item", "data-group": g, style: `top:${place * ROW}px`, onclick: () => open(g) },
      make("div", { class: "top" }, make("span", {}, where), make("span", {}, index.sources[groups.source[g]]),
        make("b", {}, `${Math.round(groups.rate[g] * 100)} %`)),
      make("div", { class: "text" }, groups.text[g]), dots);
  }

  // ---- the opened question
  const question = make("div", { class: "question" });
  const columns = make("div", { class: "columns" });
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        entry.target.fill();
      }
    }
  }, { root: columns, rootMargin: "400px" });

  function closeAll() {
    current = -1;
    question.replaceChildren();
    columns.replaceChildren(make("div", { class: "empty" }, n ? "No answer passes these filters." : "There are no answers yet."));
  }

  async function open(g) {
    current = g;
    drawList();
    const group = (await chunk(groups.chunk[g]))[groups.slot[g]];
    const text = make("div", { class: "body" });
    const reference = make("span", {});
    await Promise.all([
      renderText(text, group.prompt, index.formulasPerBlock),
      renderText(reference, group.answer, index.formulasPerBlock),
    ]);
    if (current !== g) return;  // another was opened meanwhile
    question.replaceChildren(toolbar(g, group, reference), text);
    const cards = group.answers.map((answer, k) => answerCard(answer, k, view, passes(start[g] + k)));
    columns.replaceChildren(...cards);
    columns.scrollLeft = 0;
    cards.forEach((card) => seen.observe(card));
  }

  function toolbar(g, group, reference) {
    const hasTokens = group.answers.some((answer) => answer.hasTokens) && Object.keys(tokens).length > 0;
    const button = (text, on, act) => make("button", { class: on ? "on" : "", onclick: () => { act(); open(g); } }, text);
    const paint = make("select", { onchange: (e) => { view.paint = e.target.value; open(g); } },
      make("option", { value: "ratio", selected: view.paint === "ratio" }, "colour: ratio"),
      make("option", { value: "surprise", selected: view.paint === "surprise" }, "colour: probability"));
    return make("div", { class: "bar" },
      make("b", {}, "answer: "), reference,
      make("span", { class: "soft" }, `correct rate ${groups.rate[g]}`),
      make("span", { style: "flex:1" }),
      button("text", view.mode === "maths" || !hasTokens, () => { view.mode = "maths"; }),
      hasTokens ? button("tokens", view.mode === "tokens", () => { view.mode = "tokens"; }) : null,
      hasTokens && view.mode === "tokens" ? paint : null,
      hasTokens && view.mode === "tokens" ? colorKey(view) : null);
  }

  // ---- filters
  const label = make("span", { class: "found" });
  const select = (text, key, options, fixed = false) => {  // options: [[value, name]]; fixed: there is no "all"
    if (options.length < 2 && !fixed) return null;
    const all = fixed ? options : [["", "all"], ...options];
    const change = (e) => { state[key] = all[e.target.selectedIndex][0]; filter(); };
    return make("label", {}, text, make("select", { id: `filter-${key}`, onchange: change },
      ...all.map(([, name]) => make("option", {}, name))));
  };
  const number = (text, key, otherwise) => make("label", {}, text, make("input", {
    type: "number", min: 0, id: `filter-${key}`,
    oninput: (e) => { state[key] = e.target.value === "" ? otherwise : +e.target.value; filter(); },
  }));
  const named = (names, column) => {
    const counts = new Map();
    for (const v of column) counts.set(v, (counts.get(v) ?? 0) + 1);
    return [...counts.keys()].sort((a, b) => a - b).filter((v) => names[v] !== "")
      .map((v) => [v, `${names[v].replace("_", " ")} (${counts.get(v).toLocaleString("en")})`]);
  };
  const steps = [...new Set(groups.step)].filter((s) => s != null).sort((a, b) => a - b).map((s) => [s, s]);
  const search = make("input", {
    type: "search", placeholder: "text of the question", id: "filter-search",
    oninput: (e) => { state.search = e.target.value.toLowerCase(); filter(); },
  });
  const flags = [[DISAGREE, "graders disagree"], [TRUNCATED, "cut off"]].filter(([bit]) => answers.flags.some((f) => f & bit));
  root.append(
    make("div", { class: "filters" },
      select("step", "step", steps),
      select("set", "source", named(index.sources, groups.source)),
      select("verdict", "verdict", named(index.verdicts, answers.verdict)),
      select("fate", "fate", named(index.fates, answers.fate)),
      flags.length ? select("only", "flag", [[0, "any"], ...flags], true) : null,
      number("tokens from", "min", 0), number("to", "max", Infinity), search,
      select("order", "order", [["run", "as it ran"], ["newest", "newest first"], ["rate", "hardest first"]], true),
      label),
    make("div", { class: "split" }, list, make("div", { class: "open" }, question, columns)));
  document.addEventListener("keydown", (event) => {
    if (root.hidden || /INPUT|SELECT/.test(event.target.tagName)) return;
    const move = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    const place = shown.indexOf(current) + (move ?? 0);
    if (!move || place < 0 || place >= shown.length) return;
    event.preventDefault();
    if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
    if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
    open(shown[place]);
  });
  filter();
  return { drawList };
}
