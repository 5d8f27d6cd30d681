"use strict";

// What users wrote (names, values, errors) reaches the page as text only: through `textContent`,
// `title` and `plain` below, never as HTML.

const content = JSON.parse(element("content").textContent);
const { columns, keys, goals, figures } = content;

const COLORS = [
  "#4269d0", "#e8a317", "#f2635b", "#3ca951", "#a463f2",
  "#2fb5a5", "#f07cac", "#9c6b4e", "#5fa8f0", "#8b929c",
];
const FEW = 10; // runs whose curves are drawn at first, and named beside the plot

const goal = goals[0];
const runs = content.rows.map((cells, place) => ({
  cells,
  place,
  label: content.labels[place],
  curves: content.curves[place],
  words: cells.map((cell) => String(cell ?? "")).join(" ").toLowerCase(),
  chosen: false,
  shown: true,
}));
const ranked = goal ? sorted(runs, goal.column, goal.mode === "max") : runs;
ranked.forEach((run, rank) => { run.color = COLORS[rank % COLORS.length]; });
const sorting = goal && columns.includes(goal.column)
  ? { column: goal.column, descending: goal.mode === "max" }
  : { column: "job", descending: false };

showSummary();
buildTable();
buildChoices();
chooseBest();
drawKeys();
drawFigures();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawCurves();
  drawKeys();
  drawFigures();
});

function element(id) {
  return document.getElementById(id);
}

function made(name, text, parent) {
  const node = document.createElement(name);
  node.textContent = text;
  parent.append(node);
  return node;
}

function showSummary() {
  const counts = new Map();
  for (const run of runs) {
    const status = cell(run, "status");
    counts.set(status, (counts.get(status) ?? 0) + 1);
  }
  made("span", runs.length === 1 ? "1 run" : `${runs.length} runs`, element("counts"));
  for (const [status, count] of counts) badge(status, `${count} ${status}`, element("counts"));
  for (const each of goals) showBest(each);
}

function showBest({ metric, mode, column }) {
  const best = bestRun({ column, mode });
  if (!best) return;
  const card = made("div", "", element("best"));
  card.className = "card";
  made("span", `best ${metric} (${mode === "max" ? "highest" : "lowest"})`, card);
  made("strong", written(cell(best, column), column), card).title = cell(best, column);
  const where = made("span", "", card);
  const folder = cell(best, "folder");
  if (folder === null) where.textContent = best.label;
  else made("a", best.label, where).href = link(folder);
}

function bestRun({ column, mode }) {
  const [first] = sorted(runs, column, mode === "max");
  return first && cell(first, column) !== null ? first : undefined;
}

function badge(status, text, parent) {
  const node = made("span", text, parent);
  node.className = "badge";
  node.dataset.status = status;
}

function buildTable() {
  const head = document.querySelector("#table thead tr");
  const first = made("th", "", head);
  first.title = "draw the run's curve";
  first.setAttribute("aria-label", "curve");
  columns.forEach((column) => {
    const header = made("th", "", head);
    header.scope = "col";
    header.dataset.column = column;
    header.classList.toggle("key", Object.hasOwn(keys, column));
    header.classList.toggle("number", isNumeric(column));
    made("button", column, header).addEventListener("click", () => sortBy(column));
  });
  const numeric = new Set(columns.filter(isNumeric));
  runs.forEach((run) => buildRow(run, numeric));
  goals.map(bestRun).forEach((run) => run?.row.classList.add("best"));
  element("filter").addEventListener("input", filter);
  document.querySelector(".scroll").hidden = runs.length === 0;
  element("table-note").hidden = runs.length > 0;
  showOrder();
  showCount();
}

function isNumeric(column) {
  const present = runs.map((run) => cell(run, column)).filter((value) => value !== null);
  return present.length > 0 && present.every((value) => typeof value === "number");
}

function buildRow(run, numeric) {
  run.row = made("tr", "", document.querySelector("#table tbody"));
  run.box = made("input", "", made("td", "", run.row));
  run.box.type = "checkbox";
  run.box.disabled = Object.keys(run.curves).length === 0;
  run.box.style.accentColor = run.color;
  run.box.setAttribute("aria-label", `curve of ${run.label}`);
  run.box.addEventListener("change", () => {
    run.chosen = run.box.checked;
    drawCurves();
  });
  columns.forEach((column) => buildCell(run, column, numeric.has(column)));
}

function buildCell(run, column, numeric) {
  const value = cell(run, column);
  const node = made("td", "", run.row);
  node.className = numeric ? "number" : column === "error" ? "error" : "";
  if (value === null) return;
  node.title = value;
  if (column === "status") badge(value, value, node);
  else if (column === "folder") made("a", value, node).href = link(value);
  else node.textContent = written(value, column);
}

function cell(run, column) {
  return run.cells[columns.indexOf(column)] ?? null;
}

// A relative link whatever the folder is called: `./javascript%3A...` is a folder too.
function link(folder) {
  return "./" + folder.split(/[\\/]/).map(encodeURIComponent).join("/");
}

function written(value, column) {
  if (typeof value !== "number") return String(value);
  if (column.endsWith("_bytes")) return writtenBytes(value);
  if (Number.isInteger(value)) return String(value);
  if (Math.abs(value) >= 1000) return value.toFixed(0);
  const digits = value.toPrecision(4);
  return Object.hasOwn(keys, column) ? String(Number(digits)) : digits;
}

function writtenBytes(value) {
  const step = value > 0 ? Math.min(4, Math.floor(Math.log2(value) / 10)) : 0;
  const number = value / 1024 ** step;
  return `${Number(number.toPrecision(3))} ${["B", "KiB", "MiB", "GiB", "TiB"][step]}`;
}

function sortBy(column) {
  sorting.descending = sorting.column === column && !sorting.descending;
  sorting.column = column;
  showOrder();
}

function showOrder() {
  const order = sorted(runs, sorting.column, sorting.descending);
  document.querySelector("#table tbody").append(...order.map((run) => run.row));
  for (const header of document.querySelectorAll("#table th[data-column]")) {
    const direction = sorting.descending ? "descending" : "ascending";
    header.ariaSort = header.dataset.column === sorting.column ? direction : "none";
  }
}

// Numbers before texts, and what is missing last in both directions.
function sorted(some, column, descending) {
  const sign = descending ? -1 : 1;
  const present = some.filter((run) => cell(run, column) !== null);
  const missing = some.filter((run) => cell(run, column) === null);
  present.sort((a, b) => sign * compared(cell(a, column), cell(b, column)));
  return [...present, ...missing];
}

function compared(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;
  if (typeof b === "number") return 1;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function filter() {
  const words = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const run of runs) {
    run.shown = words.every((word) => matches(run, word));
    run.row.hidden = !run.shown;
  }
  showCount();
  drawKeys();
}

// `status:fail` looks for a text in that column, `model=mlp` for a value; `lr=0.1` is enough for
// `optimizer.lr`. A word that names no column is looked for everywhere.
function matches(run, word) {
  const [, name, sign, wanted] = word.match(/^([^=:]+)([=:])(.*)$/) ?? [];
  const column = columns.find((each) => `.${each.toLowerCase()}`.endsWith(`.${name}`));
  if (column === undefined) return run.words.includes(word);
  const value = cell(run, column);
  const text = String(value).toLowerCase();
  if (sign === ":" || wanted === "") return text.includes(wanted);
  return text === wanted || Number(wanted) === value;
}

function showCount() {
  const count = runs.filter((run) => run.shown).length;
  element("shown").textContent = runs.length ? `${count} of ${runs.length}` : "";
}

function buildChoices() {
  fill(element("quantity"), quantities());
  if (goal && quantities().includes(goal.quantity)) element("quantity").value = goal.quantity;
  fill(element("key"), Object.keys(keys));
  fill(element("goal"), goals.map((each) => each.metric));
  element("goal").parentElement.hidden = goals.length < 2;
  element("quantity").addEventListener("change", drawCurves);
  element("log").addEventListener("change", drawCurves);
  element("key").addEventListener("change", drawKeys);
  element("goal").addEventListener("change", drawKeys);
  element("all").addEventListener("click", () => choose(runs.filter((run) => run.shown)));
  element("none").addEventListener("click", () => choose([]));
  element("best10").addEventListener("click", chooseBest);
}

function fill(select, names) {
  for (const name of names) made("option", name, select).value = name;
  select.parentElement.hidden = names.length === 0;
}

function quantities() {
  const names = new Set();
  for (const run of runs) {
    for (const [stage, values] of Object.entries(run.curves)) {
      for (const name of Object.keys(values)) if (name !== "epoch") names.add(`${stage}/${name}`);
    }
  }
  return [...names];
}

function chooseBest() {
  choose(ranked.filter((run) => run.shown && !run.box.disabled).slice(0, FEW));
}

function choose(some) {
  for (const run of runs) {
    run.chosen = some.includes(run) && !run.box.disabled;
    run.box.checked = run.chosen;
  }
  drawCurves();
}

function drawCurves() {
  const quantity = element("quantity").value;
  const stage = quantity.split("/", 1)[0];
  const name = quantity.slice(stage.length + 1);
  const type = element("log").checked ? "log" : "linear";
  const best = goal && bestRun(goal);
  // The best is drawn last, on top of the others.
  const drawn = ranked.filter((run) => run.curves[stage]?.[name]).reverse();
  const traces = drawn.map((run) => ({
    type: "scatter",
    mode: run.curves[stage].epoch.length > 40 ? "lines" : "lines+markers",
    x: run.curves[stage].epoch,
    y: run.curves[stage][name],
    name: short(run.label),
    meta: plain(run.label),
    hovertemplate: "%{meta}<br>epoch %{x}: %{y:.5~g}<extra></extra>",
    line: { color: run.color, width: run === best ? 3.5 : 1.5 },
    marker: { color: run.color, size: run === best ? 7 : 5 },
    visible: run.chosen,
  }));
  const named = traces.filter((trace) => trace.visible).length <= FEW && window.innerWidth > 900;
  element("curves-note").hidden = traces.length > 0;
  const last = Math.max(0, ...traces.map((trace) => trace.x.at(-1) ?? 0));
  const ticks = last <= 20 ? { dtick: 1 } : {}; // there is no half an epoch
  show("curves", traces.length > 0, traces, {
    xaxis: { title: { text: "epoch" }, tickformat: "d", ...ticks },
    yaxis: { title: { text: plain(quantity) }, type },
    showlegend: named,
    legend: { traceorder: "reversed", itemclick: false, itemdoubleclick: false },
    uirevision: `${type} ${quantity}`, // a zoom survives a checkbox
  });
}

function drawKeys() {
  const chosen = goals.find((each) => each.metric === element("goal").value);
  const some = runs.filter((run) => run.shown && chosen && cell(run, chosen.column) !== null);
  const drawable = some.length > 0 && Object.keys(keys).length > 0;
  element("keys-note").hidden = drawable;
  element("scatter-note").hidden = element("parallel-note").hidden = !drawable;
  show("scatter", drawable, ...(drawable ? scatter(some, chosen) : []));
  show("parallel", drawable, ...(drawable ? parallel(some, chosen) : []));
}

function scatter(some, { metric, column, mode }) {
  const key = element("key").value;
  const { scale, values } = keys[key];
  const best = bestRun({ column, mode });
  const completed = (run) => cell(run, "status") === "completed";
  const trace = {
    type: "scatter",
    mode: "markers",
    x: some.map((run) => plain(values[run.place])),
    y: some.map((run) => cell(run, column)),
    text: some.map((run) => plain(run.label)),
    hovertemplate: "%{text}<br>%{y:.5~g}<extra></extra>",
    marker: {
      color: color("--accent"),
      opacity: 0.75,
      size: some.map((run) => (run === best ? 16 : 9)),
      symbol: some.map((run) => (run === best ? "star" : "circle") + (completed(run) ? "" : "-open")),
      line: { color: color("--panel"), width: 1 },
    },
  };
  const marks = ticks(keys[key], some);
  const xaxis = {
    title: { text: plain(key) },
    type: scale,
    tickvals: marks?.map(plain),
    ticktext: marks?.map((mark) => short(written(mark, key))),
  };
  return [[trace], { xaxis, yaxis: { title: { text: plain(`best ${metric}`) } } }];
}

// Parallel coordinates as plain lines: Plotly's own need WebGL, and do not name a run under the
// mouse.
function parallel(some, { metric, column, mode }) {
  const best = bestRun({ column, mode });
  const axes = Object.entries(keys).map(([key, axis]) => keyAxis(key, axis, some));
  const values = some.map((run) => cell(run, column));
  const valueOf = (run) => cell(run, column);
  axes.push(upright(`best ${metric}`, valueOf, (value) => value, values, spread(values)));
  const order = sorted(some, column, mode === "min"); // the best last, on top
  const traces = order.map((run, rank) => ({
    type: "scatter",
    mode: "lines+markers",
    x: axes.map((_, place) => place),
    y: axes.map((axis) => axis.height(run)),
    meta: plain(`${run.label}, ${metric}=${written(cell(run, column), column)}`),
    hovertemplate: "%{meta}<extra></extra>",
    line: {
      color: color(["--worst", "--middle", "--best"][Math.floor((3 * rank) / order.length)]),
      width: run === best ? 4 : 1.5,
    },
    marker: { size: 4 },
    opacity: 0.8,
  }));
  return [traces, standing(axes)];
}

function keyAxis(key, axis, some) {
  const values = distinct(axis, some);
  const number = {
    category: (value) => values.indexOf(value),
    log: (value) => Math.log10(value),
    linear: (value) => value,
  }[axis.scale];
  const marks = axis.scale === "category" ? values : ticks(axis, some) ?? spread(values);
  return upright(key, (run) => axis.values[run.place], number, values, marks);
}

// An axis from 0 to 1: how high a run's value stands there, and its marks.
function upright(label, valueOf, number, values, marks) {
  const low = Math.min(...values.map(number));
  const high = Math.max(...values.map(number));
  const height = (value) => {
    if (value === null) return null;
    return high > low ? (number(value) - low) / (high - low) : 0.5;
  };
  return {
    label,
    height: (run) => height(valueOf(run)),
    marks: marks.map((mark) => ({ y: height(mark), text: short(written(mark, label)) })),
  };
}

function standing(axes) {
  const line = { color: color("--soft"), width: 1 };
  const mark = { showarrow: false, font: { size: 11 }, bgcolor: color("--panel"), opacity: 0.85 };
  const before = { ...mark, xanchor: "right", xshift: -6 };
  const after = { ...mark, xanchor: "left", xshift: 6 };
  const side = (x) => (x === axes.length - 1 ? after : before);
  return {
    xaxis: {
      side: "top",
      showgrid: false,
      range: [-0.4, axes.length - 0.6],
      tickvals: axes.map((_, x) => x),
      ticktext: axes.map((axis) => short(axis.label)),
    },
    yaxis: { visible: false, range: [-0.05, 1.05] },
    shapes: axes.map((_, x) => ({ type: "line", layer: "below", x0: x, x1: x, y0: 0, y1: 1, line })),
    annotations: axes.flatMap((axis, x) => axis.marks.map((own) => ({ ...side(x), ...own, x }))),
    showlegend: false,
    margin: { l: 20, r: 20, t: 40, b: 20 },
  };
}

function spread(values) {
  const low = Math.min(...values);
  const step = (Math.max(...values) - low) / 4;
  return step > 0 ? [0, 1, 2, 3, 4].map((count) => low + count * step) : [low];
}

// The swept values themselves where they are few, the decades of a logarithmic axis where many;
// else Plotly finds its own.
function ticks(axis, some) {
  const values = distinct(axis, some);
  if (values.length <= FEW) return values;
  return axis.scale === "log" ? decades(values) : undefined;
}

function distinct({ values }, some) {
  const own = some.map((run) => values[run.place]).filter((value) => value !== null);
  return [...new Set(own)];
}

function decades(values) {
  const first = Math.ceil(Math.log10(Math.min(...values)));
  const last = Math.floor(Math.log10(Math.max(...values)));
  return Array.from({ length: last - first + 1 }, (_, step) => Number(`1e${first + step}`));
}

function drawFigures() {
  element("figures").hidden = Object.keys(figures).length === 0;
  Object.entries(figures).forEach(([heading, figure], place) => {
    const id = `figure-${place}`;
    if (!element(id)) {
      made("h3", heading, element("figures"));
      Object.assign(made("div", "", element("figures")), { id, className: "plot" });
    }
    // The figure's own size and title would not fit the page, nor its colours a dark one.
    const own = { ...figure.layout, width: undefined, title: undefined };
    show(id, true, figure.data, own);
  });
}

// Draws where there is something, else leaves no empty plot behind.
function show(id, drawable, traces, layout) {
  const node = element(id);
  node.hidden = !drawable;
  if (!drawable) return;
  const config = { responsive: true, displaylogo: false };
  Plotly.react(node, traces, { ...layout, template: theme() }, config);
}

function theme() {
  const axis = {
    gridcolor: color("--line"), zeroline: false, automargin: true, exponentformat: "power",
  };
  return {
    layout: {
      paper_bgcolor: color("--panel"),
      plot_bgcolor: color("--panel"),
      font: { color: color("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
      colorway: COLORS,
      hovermode: "closest",
      hoverlabel: { align: "left" },
      margin: { l: 60, r: 20, t: 20, b: 50 },
      xaxis: axis,
      yaxis: axis,
    },
  };
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Plotly reads tags such as <b> and <a> in its texts.
function plain(value) {
  if (typeof value !== "string") return value;
  return value.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

// A long name beside a plot would leave no room for the plot.
function short(text) {
  return plain(text.length > 45 ? `${text.slice(0, 44)}…` : text);
}
