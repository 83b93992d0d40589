// Curves, stacked areas and heat maps as SVG. A figure that is null leaves a gap.

const WIDTH = 480, HEIGHT = 190, LEFT = 50, RIGHT = 14, TOP = 8, BOTTOM = 20;
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const color = (i) => `var(--c${i % 10})`;

function show(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return size >= 100 ? value.toFixed(1) : size >= 1 ? value.toFixed(3) : value.toFixed(4);
}

function ticks(low, high, n = 4) {
  const raw = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) out.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return out;
}

// At most `limit` points: of each bucket the first that has a value, and the extremes.
function thin(xs, ys, limit = 600) {
  const kept = [];
  const size = Math.max(1, Math.ceil(xs.length / limit));
  for (let start = 0; start < xs.length; start += size) {
    const bucket = [];
    for (let i = start; i < Math.min(start + size, xs.length); i++) if (ys[i] != null) bucket.push(i);
    if (!bucket.length) {
      kept.push([xs[start], null]);
      continue;
    }
    const lowest = bucket.reduce((a, b) => (ys[b] < ys[a] ? b : a));
    const highest = bucket.reduce((a, b) => (ys[b] > ys[a] ? b : a));
    for (const i of [...new Set([bucket[0], lowest, highest])].sort((a, b) => a - b)) kept.push([xs[i], ys[i]]);
  }
  return kept;
}

function frame(xs, low, high, log) {
  const first = xs[0], last = xs[xs.length - 1];
  const x = (v) => LEFT + (last === first ? 0.5 : (v - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const scale = log ? Math.log10 : (v) => v;
  const [a, b] = [scale(low), scale(high)];
  const y = (v) => HEIGHT - BOTTOM - ((scale(v) - a) / (b - a || 1)) * (HEIGHT - TOP - BOTTOM);
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const marks = log ? logTicks(low, high) : ticks(low, high);
  for (const v of marks) {
    root.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(v), y2: y(v) }));
    root.append(svg("text", { x: LEFT - 5, y: y(v) + 3, "text-anchor": "end" }, short(v, log ? 0 : marks[1] - marks[0])));
  }
  for (const v of ticks(first, last, 5).filter((t) => Number.isInteger(t))) {
    root.append(svg("text", { x: x(v), y: HEIGHT - 5, "text-anchor": "middle" }, short(v, 1)));
  }
  return { root, x, y };
}

// Enough digits to tell marks that are `step` apart.
function short(v, step = 0) {
  const size = Math.abs(v);
  if (size === 0) return "0";
  if (size >= 1e9 || size < 1e-3) return v.toExponential(step ? Math.max(0, Math.ceil(Math.log10(size / step) - 0.5)) : 0);
  const digits = step ? Math.max(3, Math.ceil(Math.log10(size / step)) + 1) : 3;
  if (size >= 1e6) return `${+(v / 1e6).toPrecision(digits)}M`;
  if (size >= 1e4) return `${+(v / 1e3).toPrecision(digits)}k`;
  return String(+v.toPrecision(digits));
}

function logTicks(low, high) {
  const out = [];
  for (let p = Math.ceil(Math.log10(low)); p <= Math.floor(Math.log10(high)); p++) out.push(10 ** p);
  return out.length ? out.filter((_, i) => i % Math.ceil(out.length / 5) === 0) : [low, high];
}

function card(title, note, body, legend) {
  return make("div", { class: "card" }, make("h3", {}, title, make("span", { class: "soft" }, note ?? "")), body, legend ?? "");
}

function legendOf(names) {
  const items = names.map((name, i) => make("span", {}, make("i", { style: `background:${color(i)}` }), name));
  return make("div", { class: "legend" }, ...items);
}

// Moving over the chart names the values of the nearest step.
function hover(root, x, xs, describe) {
  const line = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  root.append(line);
  root.addEventListener("mousemove", (event) => {
    const box = root.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(x(xs[i]) - at) < Math.abs(x(xs[best]) - at)) best = i;
    line.setAttribute("x1", x(xs[best]));
    line.setAttribute("x2", x(xs[best]));
    line.setAttribute("visibility", "visible");
    tip.show(describe(best), event);
  });
  root.addEventListener("mouseleave", () => {
    line.setAttribute("visibility", "hidden");
    tip.hide();
  });
}

// series: [{name, ys, low?, high?}], low and high drawn as a band.
function lineChart(title, xs, series, { log = false, from = null, to = null } = {}) {
  const all = series.flatMap((s) => [s.ys, s.low ?? [], s.high ?? []]).flat().filter((v) => v != null && (!log || v > 0));
  if (!all.length) return null;
  let low = Math.min(all.reduce((a, b) => Math.min(a, b)), from ?? Infinity);
  let high = Math.max(all.reduce((a, b) => Math.max(a, b)), to ?? -Infinity);
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
  if (!log) high += (high - low) * 0.04;
  const { root, x, y } = frame(xs, low, high, log);
  series.forEach((s, i) => {
    if (s.low) root.append(svg("path", { d: band(xs, s.low, s.high, x, y), fill: color(i), opacity: 0.15 }));
    const points = thin(xs, log ? s.ys.map((v) => (v > 0 ? v : null)) : s.ys);
    const sparse = points.filter((p) => p[1] != null).length < Math.max(2, points.length / 2);
    const drawn = sparse ? points.filter((p) => p[1] != null) : points;  // an evaluation every few steps is one line
    root.append(svg("path", { d: path(drawn, x, y), fill: "none", stroke: color(i), "stroke-width": 1.6 }));
    if (drawn.length < 60) {
      for (const [px, py] of drawn) if (py != null) root.append(svg("circle", { cx: x(px), cy: y(py), r: 2, fill: color(i) }));
    }
  });
  hover(root, x, xs, (i) => [`step ${xs[i]}`, ...series.map((s) => `${s.name}  ${show(s.ys[i])}`)].join("\n"));
  const last = series[0].ys.findLast((v) => v != null);
  return card(title, show(last), root, series.length > 1 ? legendOf(series.map((s) => s.name)) : null);
}

function path(points, x, y) {
  let d = "", pen = false;
  for (const [px, py] of points) {
    if (py == null) pen = false;
    else {
      d += `${pen ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
      pen = true;
    }
  }
  return d;
}

function band(xs, low, high, x, y) {
  const there = xs.map((_, i) => i).filter((i) => low[i] != null && high[i] != null);
  if (!there.length) return "";
  const up = there.map((i) => `${x(xs[i]).toFixed(1)} ${y(high[i]).toFixed(1)}`);
  const down = there.reverse().map((i) => `${x(xs[i]).toFixed(1)} ${y(low[i]).toFixed(1)}`);
  return `M${up.join("L")}L${down.join("L")}Z`;
}

function stackChart(title, xs, series, unit) {
  const rows = xs.map((_, i) => i).filter((i) => series.some((s) => s.ys[i] != null));
  if (!rows.length) return null;
  const kept = rows.filter((_, n) => n % Math.ceil(rows.length / 600) === 0);
  const steps = kept.map((i) => xs[i]);
  const totals = kept.map((i) => series.reduce((sum, s) => sum + (s.ys[i] ?? 0), 0));
  const { root, x, y } = frame(steps, 0, Math.max(...totals) || 1, false);
  let below = kept.map(() => 0);
  series.forEach((s, n) => {
    const above = kept.map((i, k) => below[k] + (s.ys[i] ?? 0));
    root.append(svg("path", { d: band(steps, below, above, x, y), fill: color(n), opacity: 0.75 }));
    below = above;
  });
  hover(root, x, steps, (k) => [
    `step ${steps[k]}`, ...series.map((s) => `${s.name}  ${show(s.ys[kept[k]])}`), `sum  ${show(totals[k])} ${unit}`,
  ].join("\n"));
  return card(title, unit, root, legendOf(series.map((s) => s.name)));
}

// Counts per bin over time, each step's counts as shares of its sum; bins span [0, 1].
function heatChart(title, xs, rows) {
  const there = xs.map((_, i) => i).filter((i) => rows[i]?.length);
  if (!there.length) return null;
  const size = Math.ceil(there.length / 160);
  const columns = [];
  for (let start = 0; start < there.length; start += size) {
    const part = there.slice(start, start + size);
    const counts = rows[part[0]].map((_, bin) => part.reduce((sum, i) => sum + rows[i][bin], 0));
    const total = counts.reduce((a, b) => a + b, 0) || 1;
    columns.push({ from: xs[part[0]], to: xs[part[part.length - 1]], counts, shares: counts.map((c) => c / total) });
  }
  const bins = columns[0].counts.length;
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const w = (WIDTH - LEFT - RIGHT) / columns.length, h = (HEIGHT - TOP - BOTTOM) / bins;
  const top = Math.max(...columns.flatMap((c) => c.shares));
  columns.forEach((column, i) => column.shares.forEach((share, bin) => {
    const cell = svg("rect", {
      x: LEFT + i * w, y: HEIGHT - BOTTOM - (bin + 1) * h, width: w + 0.3, height: h + 0.3,
      fill: `rgba(var(--heat), ${(share / top) ** 0.6})`,
    });
    const steps = column.from === column.to ? `step ${column.from}` : `steps ${column.from} to ${column.to}`;
    const value = bins > 1 ? (bin / (bins - 1)).toFixed(2) : "";
    cell.addEventListener("mousemove", (e) => tip.show(`${steps}\nbin ${value}: ${column.counts[bin]} (${(share * 100).toFixed(1)} %)`, e));
    cell.addEventListener("mouseleave", () => tip.hide());
    root.append(cell);
  }));
  for (const v of [0, 0.5, 1]) {
    root.append(svg("text", { x: LEFT - 5, y: HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM - h) - h / 2 + 3, "text-anchor": "end" }, v));
  }
  root.append(svg("text", { x: LEFT, y: HEIGHT - 5 }, columns[0].from));
  root.append(svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, columns[columns.length - 1].to));
  return card(title, "darker: more", root);
}

// The metrics of a run: first the ones that matter for NFT, then every other by its prefix.
function drawCurves(metrics) {
  const { step: xs, scalars, histograms } = metrics;
  const used = new Set();
  const line = (names, title, options) => {
    const there = names.filter((n) => scalars[n]);
    there.forEach((n) => used.add(n));
    return there.length ? lineChart(title, xs, there.map((n) => ({ name: n, ys: scalars[n] })), options) : null;
  };
  const stack = (names, title, unit) => {
    const there = names.filter((n) => scalars[n]);
    there.forEach((n) => used.add(n));
    return there.length ? stackChart(title, xs, there.map((n) => ({ name: n.split("/").pop(), ys: scalars[n] })), unit) : null;
  };
  const seconds = Object.keys(scalars).filter((n) => n.startsWith("seconds/") && !/total|verify/.test(n));
  const main = [
    line(["accuracy/train"], "Accuracy of sampled answers", { from: 0 }),
    evaluation(xs, scalars, used),
    ...Object.entries(histograms).map(([name, rows]) => heatChart(name === "correct_rate/hist" ? "Correct rate of questions" : name, xs, rows)),
    stack(["groups/kept", "groups/surplus", "groups/all_correct", "groups/all_wrong", "groups/too_few", "groups/stale_dropped"], "Question groups", "groups"),
    line(["length/mean"], "Answer length, tokens", { from: 0 }),
    line(["length/truncated"], "Share cut off at the length limit", { from: 0 }),
    line(["loss/total", "loss/positive", "loss/negative"], "Loss"),
    line(["gap/mean", "gap/max"], "Trainer/engine gap, |Δ log p|", { log: true }),
    stack(seconds, "Seconds per phase", "s"),
    line(["seconds/verify_wait"], "Seconds that grading adds to a step", { from: 0 }),
    line(["ratio/mean"], "Likelihood ratio, mean"),
    line(["clamp/share"], "Share of negatives at the clamp", { from: 0 }),
    line(["grad_norm"], "Gradient norm", { from: 0 }),
    line(["lr"], "Learning rate", { from: 0 }),
    line(["tokens_per_s"], "Tokens per second", { from: 0 }),
  ];
  const root = document.getElementById("curves");
  root.append(make("div", { class: "cards" }, ...main.filter(Boolean)));
  const rest = Object.keys(scalars).filter((n) => !used.has(n)).sort();
  if (!rest.length) return;
  const more = make("details", {}, make("summary", {}, `${rest.length} more metrics`));
  more.addEventListener("toggle", () => {
    if (more.open && more.children.length === 1) {
      const cards = rest.map((n) => lineChart(n, xs, [{ name: n, ys: scalars[n] }])).filter(Boolean);
      more.append(make("div", { class: "cards", style: "margin-top:10px" }, ...cards));
    }
  });
  root.append(more);
}

// Held-out accuracy with its interval where the run wrote one.
function evaluation(xs, scalars, used) {
  const names = Object.keys(scalars).filter((n) => n.startsWith("eval/") && n.endsWith("accuracy"));
  if (!names.length) return null;
  const series = names.map((name) => {
    const [low, high] = [`${name}_low`, `${name}_high`];
    [name, low, high].forEach((n) => used.add(n));
    return { name, ys: scalars[name], low: scalars[high] && scalars[low], high: scalars[low] && scalars[high] };
  });
  return lineChart("Held-out accuracy, 95 % interval", xs, series, { from: 0 });
}
