"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const { adapters, modules, metrics, pairs } = data;
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const kinds = [...new Set(modules.map((m) => m.kind))];
const layers = [...new Set(modules.map((m) => m.layer))].sort((a, b) => (a ?? -1) - (b ?? -1));

// ---- building blocks ---------------------------------------------------------------------------
const SVG = "http://www.w3.org/2000/svg";
function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat());
  return node;
}
const el = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);
const inside = (id, part) => document.querySelector(`#${id} .${part}`);
function number(x) {
  if (x === null || x === undefined) return "none";
  if (x === 0) return "0";
  return Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5 ? String(+x.toPrecision(3)) : x.toExponential(1);
}
const hundredths = (x) => (Math.round(100 * x) / 100 + 0).toFixed(2);  // no -0.00
function bytes(n) {
  for (const unit of ["B", "kB", "MB"]) {
    if (n < 1000) return `${n.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(2)} GB`;
}
function select(label, options, onchange) {
  const node = el("select", { onchange }, options.map(([value, text]) => el("option", { value }, text)));
  return [el("label", {}, label, node), node];
}

// ---- ranks: what `lora-merge resize` would keep --------------------------------------------------
const square = (values, count) => {
  let sum = 0;
  for (let i = Math.min(count, values.length) - 1; i >= 0; i--) sum += values[i] * values[i];
  return sum;
};
function rankFor(values, stored, rule, value) {
  const alive = values.filter((v) => v > 1e-12 * values[0]);
  if (!alive.length) return Math.min(1, stored);
  if (rule === "rank") return Math.min(value, stored);
  const total = square(alive, alive.length);
  let tail = 0, rank = alive.length;
  while (rank > 1 && tail + alive[rank - 1] ** 2 <= total * (1 - value + 4e-16)) tail += alive[--rank] ** 2;
  return Math.min(rank, stored);
}
function kept(adapter, rule, value) {
  const sum = { energy: 0, total: 0, parameters: 0, before: 0, bytes: 0, least: Infinity, most: 0 };
  adapter.values.forEach((values, i) => {
    if (!values) return;
    const rank = rankFor(values, adapter.rank[i], rule, value);
    sum.energy += square(values, rank);
    sum.total += square(values, values.length);
    sum.parameters += rank * adapter.cost[i];
    sum.before += adapter.rank[i] * adapter.cost[i];
    sum.bytes += rank * adapter.cost[i] * adapter.bytes[i];
    sum.least = Math.min(sum.least, rank);
    sum.most = Math.max(sum.most, rank);
  });
  return { ...sum, share: sum.total > 0 ? sum.energy / sum.total : 1 };
}
function rankSection() {
  const section = document.getElementById("rank");
  const [label, which] = select("adapter ", adapters.map((a, i) => [i, a.name]), reset);
  const [ruleLabel, rule] = select("keep ", [["rank", "one rank everywhere"], ["energy", "a share of every module's energy"]], reset);
  const slider = el("input", { type: "range", id: "rank-slider", oninput: show });
  inside("rank", "controls").append(label, ruleLabel, el("label", {}, "how much ", slider));
  const out = inside("rank", "readout");
  function reset() {
    const most = Math.max(1, ...adapters[which.value].rank.map((r) => r || 0));
    const [min, max, value] = rule.value === "rank" ? [1, most, most] : [50, 100, 95];
    Object.assign(slider, { min, max, step: 1 });
    slider.value = value;
    show();
  }
  function show() {
    const adapter = adapters[which.value], chosen = rule.value === "rank" ? +slider.value : slider.value / 100;
    const now = kept(adapter, rule.value, chosen);
    const text = rule.value === "rank" ? `rank ${chosen}` : `${slider.value} % of the energy`;
    slider.setAttribute("aria-valuetext", text);
    const command = `lora-merge resize ${adapter.reference} --${rule.value} ${chosen} -o small`;
    const ranks = now.least === now.most ? `rank ${now.least}` : `ranks ${now.least} to ${now.most}`;
    out.dataset.energy = now.share;
    out.dataset.parameters = now.parameters;
    out.replaceChildren(
      `${text}: keeps ${(100 * now.share).toFixed(1)} % of the energy in ${ranks}, ` +
      `${now.parameters.toLocaleString("en")} of ${now.before.toLocaleString("en")} parameters ` +
      `(${(100 * now.parameters / now.before).toFixed(0)} %), ${bytes(now.bytes)}\n`, el("code", {}, command));
    const most = +slider.max, least = +slider.min, steps = [];
    for (let k = least; k <= most; k++) steps.push(kept(adapter, rule.value, rule.value === "rank" ? k : k / 100));
    const points = steps.map((s, i) => [least + i, 100 * s.share]);
    const sizes = steps.map((s, i) => [least + i, 100 * s.parameters / s.before]);
    inside("rank", "figure").replaceChildren(plot([
      { name: "energy kept", points, colour: COLOURS[0], dash: "" },
      { name: "parameters kept", points: sizes, colour: COLOURS[1], dash: DASHES[1] },
    ], { x: rule.value === "rank" ? "rank" : "energy asked for (%)", y: "%", low: 0, high: 100, height: 200, at: +slider.value }));
  }
  if (!modules.length) return;
  section.hidden = false;
  reset();
}

// ---- a plot of lines, with a cursor ---------------------------------------------------------------
function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of high / low > 1e3 ? [1] : [1, 2, 5]) {
        const value = m * 10 ** e;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    return found;
  }
  const raw = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power, found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(+v.toPrecision(12));
  return found;
}
function plot(lines, { x, y, low, high, log = false, height = 320, at = null, oncursor = null }) {
  const width = 760, left = 62, right = 12, top = 10, bottom = 40;
  const xs = lines.flatMap((l) => l.points.map((p) => p[0]));
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  const to = log ? Math.log10 : (v) => v;
  const px = (v) => left + (v - x0) / (x1 - x0) * (width - left - right);
  const py = (v) => top + (1 - (to(Math.max(v, low)) - to(low)) / (to(high) - to(low) || 1)) * (height - top - bottom);
  const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
    "aria-label": `${y} over ${x}: ${lines.map((l) => l.name).join(", ")}`, tabindex: oncursor ? 0 : null });
  for (const v of ticks(low, high, log)) node.append(
    svg("line", { class: "axis", x1: left, x2: width - right, y1: py(v), y2: py(v) }),
    svg("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, number(v)));
  for (const v of ticks(x0, x1, false)) if (Number.isInteger(v)) node.append(
    svg("text", { x: px(v), y: height - bottom + 16, "text-anchor": "middle" }, String(v)));
  node.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x),
    svg("text", { x: 12, y: (top + height - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(top + height - bottom) / 2})` }, y));
  for (const line of lines) {
    const points = line.points.map((p) => `${px(p[0]).toFixed(1)},${py(p[1]).toFixed(1)}`).join(" ");
    node.append(svg("polyline", { points, fill: "none", stroke: line.colour, "stroke-width": 2, "stroke-dasharray": line.dash }));
    if (line.points.length === 1) node.append(svg("circle", { cx: px(line.points[0][0]), cy: py(line.points[0][1]), r: 3, fill: line.colour }));
  }
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  node.append(cursor);
  let position = at;
  function move(value) {
    position = Math.min(x1, Math.max(x0, value));
    cursor.setAttribute("x1", px(position));
    cursor.setAttribute("x2", px(position));
    cursor.setAttribute("visibility", "visible");
    if (oncursor) oncursor(position);
  }
  if (at !== null) move(at);
  if (oncursor) {
    node.addEventListener("pointermove", (event) => {
      const box = node.getBoundingClientRect(), where = (event.clientX - box.left) * width / box.width;
      move(Math.round(x0 + (where - left) / (width - left - right) * (x1 - x0)));
    });
    node.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      move(position === null ? x0 : position + step);
    });
  }
  const legend = svg("svg", { viewBox: `0 0 ${width} ${18 * Math.ceil(lines.length / 3)}`, width, height: 18 * Math.ceil(lines.length / 3), "aria-hidden": true });
  lines.forEach((line, i) => {
    const lx = left + (i % 3) * 230, ly = 9 + 18 * Math.floor(i / 3);
    const name = line.name.length > 30 ? `${line.name.slice(0, 14)}…${line.name.slice(-14)}` : line.name;
    legend.append(svg("line", { x1: lx, x2: lx + 26, y1: ly, y2: ly, stroke: line.colour, "stroke-width": 2, "stroke-dasharray": line.dash }),
      svg("text", { x: lx + 32, y: ly + 4 }, name));
  });
  return el("div", {}, node, legend);
}

// ---- spectra ----------------------------------------------------------------------------------------
const median = (list) => [...list].sort((a, b) => a - b)[(list.length - 1) >> 1];
let showModule = () => {};
function spectraSection() {
  const choices = [["all", "median of all modules"], ...kinds.map((k) => [`kind:${k}`, `median of ${k}`]), ...modules.map((m, i) => [i, m.name])];
  const [moduleLabel, which] = select("module ", choices, draw);
  const [scaleLabel, scale] = select("scale ", [["log", "logarithmic"], ["linear", "linear"]], draw);
  const [whatLabel, what] = select("show ", [["values", "singular values"], ["energy", "energy kept"]], draw);
  inside("spectra", "controls").append(moduleLabel, whatLabel, scaleLabel);
  const out = inside("spectra", "readout");
  function curve(adapter) {
    const chosen = modules.map((m, i) => i).filter((i) => adapter.values[i] && adapter.values[i][0] > 0 &&
      (which.value === "all" || which.value === String(i) || which.value === `kind:${modules[i].kind}`));
    const curves = chosen.map((i) => {
      if (what.value === "values") return adapter.values[i];
      const total = square(adapter.values[i], adapter.values[i].length);
      return adapter.values[i].map((_, k) => 100 * square(adapter.values[i], k + 1) / total);
    });
    const size = Math.max(0, ...curves.map((c) => c.length)), rest = what.value === "values" ? 0 : 100;
    return Array.from({ length: size }, (_, k) => [k + 1, median(curves.map((c) => c[k] ?? rest))]);
  }
  function draw() {
    scale.disabled = what.value === "energy";
    const log = what.value === "values" && scale.value === "log";
    const lines = adapters.map((adapter, i) => ({ name: adapter.name, points: curve(adapter),
      colour: COLOURS[i % 7], dash: DASHES[Math.floor(i / 7) % 4] })).filter((l) => l.points.length);
    if (!lines.length) { inside("spectra", "figure").replaceChildren("every value is zero"); return; }
    const values = lines.flatMap((l) => l.points.map((p) => p[1]));
    const high = what.value === "energy" ? 100 : Math.max(...values);
    const low = log ? Math.max(Math.min(...values.filter((v) => v > 0)), high * 1e-6) : 0;
    const label = what.value === "energy" ? "energy kept (%)" : "singular value";
    const read = (k) => { out.textContent = `${k}: ` + lines.map((l) => `${l.name} ${number(l.points[k - 1]?.[1])}`).join(", "); };
    inside("spectra", "figure").replaceChildren(plot(lines, { x: "i (rank)", y: label, low: log && low === high ? high / 2 : low, high, log, oncursor: read }));
    out.textContent = "Point at the figure, or focus it and press the left and right arrow keys.";
    const rows = lines[0] ? Math.max(...lines.map((l) => l.points.length)) : 0;
    inside("spectra", "table").replaceChildren(el("table", {},
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "i"), lines.map((l) => el("th", { scope: "col" }, l.name)))),
      el("tbody", {}, Array.from({ length: rows }, (_, k) => el("tr", {}, el("th", { scope: "row" }, String(k + 1)),
        lines.map((l) => el("td", {}, number(l.points[k]?.[1]))))))));
  }
  if (!modules.length) return;
  document.getElementById("spectra").hidden = false;
  showModule = (index) => { which.value = index; draw(); };
  draw();
}

// ---- heat maps: tables whose cells have colours, walked with the arrow keys -------------------------
const CIVIDIS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
const DIVERGING = [[178, 78, 0], [232, 165, 104], [245, 245, 240], [125, 178, 216], [0, 82, 150]];
function colour(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
  const rgb = stops[i].map((c, k) => Math.round(c + (at - i) * (stops[i + 1][k] - c)));
  const light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140;
  return `background:rgb(${rgb});color:${light ? "#000" : "#fff"}`;
}
const shareOf = (v, low, high, log) => high <= low ? 0.5 : log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low);
function bar(stops, low, high, words) {
  const steps = stops.map((s) => `rgb(${s})`).join(",");
  return el("p", { class: "note" }, `${words}: ${number(low)}`, el("span", { class: "bar", style: `background:linear-gradient(90deg,${steps})` }), number(high));
}
// rows: [name, [cell | null]], a cell is {value, text, style, say, go}
function heat(caption, heads, rows, out, corner = "layer") {
  const body = el("tbody", {});
  rows.forEach(([name, cells], r) => body.append(el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell, c) => cell
    ? el("td", { style: cell.style, title: cell.say, tabindex: -1, "data-at": `${r},${c}`,
        onfocus: () => { out.textContent = cell.say; }, onpointerenter: () => { out.textContent = cell.say; },
        onclick: () => cell.go && cell.go() }, cell.text)
    : el("td", { class: "none", "aria-label": "none" })))));
  const first = body.querySelector("td[data-at]");
  if (first) first.tabIndex = 0;
  body.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Enter") event.target.click();
    if (!step || !event.target.dataset.at) return;
    event.preventDefault();
    let [r, c] = event.target.dataset.at.split(",").map(Number), next = null;
    while (!next) {
      r += step[0]; c += step[1];
      if (r < 0 || c < 0 || r >= rows.length || c >= heads.length) return;
      next = body.querySelector(`td[data-at="${r},${c}"]`);
    }
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return el("table", { class: heads.length > 24 ? "heat many" : "heat" }, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, el("td", { class: "corner" }, corner), heads.map((h) => el("th", { scope: "col" }, h)))), body);
}
const heads = layers.map((l) => l === null ? "-" : String(l));
function byPlace(cellOf) {
  const at = new Map(modules.map((m, i) => [`${m.kind} ${m.layer}`, i]));
  return kinds.map((kind) => [kind, layers.map((layer) => {
    const index = at.get(`${kind} ${layer}`);
    return index === undefined ? null : cellOf(index);
  })]);
}
function mapSection() {
  const [label, which] = select("show ", metrics.map((m, i) => [i, m.label]), draw);
  inside("maps", "controls").append(label);
  const out = inside("maps", "readout");
  function draw() {
    const metric = metrics[which.value];
    const all = adapters.flatMap((a) => a.metrics[metric.key]).filter((v) => v !== null && (v > 0 || !metric.log));
    const low = Math.min(...all), high = Math.max(...all);
    inside("maps", "scale").replaceChildren(all.length ? bar(CIVIDIS, low, high, `${metric.label}, one ${metric.log ? "logarithmic" : "linear"} scale for all`) : "nothing to show");
    inside("maps", "figure").replaceChildren(...adapters.map((adapter) => heat(adapter.name, heads, byPlace((i) => {
      const value = adapter.metrics[metric.key][i];
      if (value === null) return null;
      const shape = adapter.shape[i], experts = shape[2] > 1 ? `, ${shape[2]} experts` : "";
      return { text: number(value), style: colour(CIVIDIS, shareOf(value, low, high, metric.log)),
        say: `${adapter.name}, ${modules[i].name}: ${metric.label} ${number(value)}; ${shape[0]} x ${shape[1]}, rank ${adapter.rank[i]}${experts}`,
        go: () => showModule(i) };
    }), out)));
    out.textContent = "Point at a cell, or walk the map with the arrow keys; Enter shows its spectrum.";
  }
  if (!modules.length) return;
  document.getElementById("maps").hidden = false;
  draw();
}

// ---- pairs --------------------------------------------------------------------------------------------
function dendrogram() {
  const { merges, heights } = pairs.tree, count = adapters.length, width = 760, left = 190, row = 20;
  const high = Math.max(...heights, 1e-9), x = (h) => left + h / high * (width - left - 40);
  const node = svg("svg", { viewBox: `0 0 ${width} ${row * count + 22}`, width, height: row * count + 22, role: "img",
    "aria-label": `Tree of the adapters by 1 - cosine, average linkage; in order: ${pairs.order.map((i) => adapters[i].name).join(", ")}` });
  const where = new Map(pairs.order.map((leaf, place) => [leaf, [left, row * place + row / 2]]));
  for (const leaf of pairs.order) {
    const name = adapters[leaf].name;
    node.append(svg("text", { x: left - 6, y: where.get(leaf)[1] + 4, "text-anchor": "end" }, name.length > 26 ? `${name.slice(0, 12)}…${name.slice(-12)}` : name));
  }
  merges.forEach(([a, b], k) => {
    const [ax, ay] = where.get(a), [bx, by] = where.get(b), at = x(Math.max(heights[k], 0));
    node.append(svg("path", { d: `M${ax} ${ay}H${at}V${by}H${bx}`, fill: "none", stroke: "currentColor" }));
    where.set(count + k, [at, (ay + by) / 2]);
  });
  node.append(svg("text", { x: left, y: row * count + 14 }, "0"),
    svg("text", { x: width - 20, y: row * count + 14, "text-anchor": "end" }, `1 - cosine = ${number(high)}`));
  return node;
}
function groups() {
  const members = new Map();
  pairs.groups.forEach((g, i) => members.set(g, [...(members.get(g) || []), adapters[i].name]));
  if (members.size < 2 || members.size === adapters.length) return el("p", { class: "note" }, members.size < 2 ? "No groups stand out." : "Every adapter stands alone.");
  return el("ul", {}, [...members].map(([g, names]) => el("li", {}, `group ${g + 1}: ${names.join(", ")}`)));
}
function similarSection() {
  if (!pairs) return;
  const out = inside("similar", "readout");
  let chosen = null;
  function pairMap(i, j) {
    chosen = [Math.min(i, j), Math.max(i, j)];
    const place = inside("similar", "map");
    if (!pairs.modules) { place.replaceChildren(el("p", { class: "note" }, "Too many pairs to hold module by module: name fewer adapters.")); return; }
    const of = pairs.modules.cosine[chosen], times = pairs.modules.interference[chosen], names = chosen.map((n) => adapters[n].name).join(" / ");
    place.replaceChildren(el("h3", {}, `${names}, by layer and module`), bar(DIVERGING, -1, 1, "cosine"),
      heat("cosine of the deltas", heads, byPlace((m) => of[m] === null ? null : {
        text: hundredths(of[m]), style: colour(DIVERGING, (of[m] + 1) / 2), go: () => showModule(m),
        say: `${names}, ${modules[m].name}: cosine ${of[m]}, interference ${number(times[m])} times chance` }), out));
  }
  const order = pairs.order, names = order.map((i) => adapters[i].name);
  const matrix = heat("cosine of the deltas", order.map((i) => String(i + 1)), order.map((i, r) => [`${i + 1} ${names[r]}`, order.map((j) => ({
    text: hundredths(pairs.cosine[i][j]), style: colour(DIVERGING, (pairs.cosine[i][j] + 1) / 2),
    go: () => { if (i !== j) pairMap(i, j); },
    say: i === j ? `${adapters[i].name}: Frobenius norm ${number(adapters[i].frobenius)}` :
      `${adapters[i].name} / ${adapters[j].name}: cosine ${pairs.cosine[i][j]}, interference ${number(pairs.interference[i][j])} times chance, ` +
      `${(100 * pairs.conflict[i][j]).toFixed(0)} % of the signs differ, a sum keeps ${(100 * pairs.cancellation[i][j]).toFixed(0)} % of the norms` }))]), out, "");
  inside("similar", "figure").replaceChildren(bar(DIVERGING, -1, 1, "cosine, always from -1 to 1"), matrix);
  if (pairs.tree) inside("similar", "tree").replaceChildren(dendrogram(), groups());
  document.getElementById("similar").hidden = false;
  out.textContent = "Point at a cell, or walk the matrix with the arrow keys; Enter shows that pair by layer.";
  pairMap(0, 1);
}

rankSection();
spectraSection();
mapSection();
similarSection();
})();
