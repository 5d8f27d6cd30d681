"use strict";

// Names, values and errors come from users, so they reach the page as text only: through
// `textContent`, `title` and `escapeTags` below, never as HTML.

const content = JSON.parse(element("content").textContent);
const { columns, keys, goals, figures } = content;

const COLORS = [
  "#4269d0", "#e8a317", "#f2635b", "#3ca951", "#a463f2",
  "#2fb5a5", "#f07cac", "#9c6b4e", "#5fa8f0", "#8b929c",
];
const POSITIONS = ["epoch", "step"]; // columns that are no quantities
const MAX_LABELED = 10; // curves to draw at first, legend entries, and ticks of swept values

const goal = goals[0];
const runs = content.rows.map((cells, index) => ({
  cells,
  index,
  label: content.labels[index],
  link: content.links[index],
  curves: content.curves[index],
  text: cells.map((cell) => String(cell ?? "")).join(" ").toLowerCase(),
  selected: false,
  shown: true,
}));
const ranked = goal ? sortRuns(runs, goal.column, goal.mode === "max") : runs;
ranked.forEach((run, rank) => { run.color = COLORS[rank % COLORS.length]; });
const sorting = goal && columns.includes(goal.column)
  ? { column: goal.column, descending: goal.mode === "max" }
  : { column: "job", descending: false };

showSummary();
buildTable();
setUpControls();
selectBest();
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

function addElement(tag, text, parent) {
  const node = document.createElement(tag);
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
  addElement("span", runs.length === 1 ? "1 run" : `${runs.length} runs`, element("counts"));
  for (const [status, count] of counts) addBadge(status, `${count} ${status}`, element("counts"));
  for (const monitored of goals) showBest(monitored);
}

function showBest({ metric, mode, column }) {
  const best = bestRun({ column, mode });
  if (!best) return;
  const card = addElement("div", "", element("best"));
  card.className = "card";
  addElement("span", `best ${metric} (${mode === "max" ? "highest" : "lowest"})`, card);
  addElement("strong", formatValue(cell(best, column), column), card).title = cell(best, column);
  const caption = addElement("span", "", card);
  const folder = cell(best, "folder");
  if (folder === null) caption.textContent = best.label;
  else addElement("a", best.label, caption).href = best.link;
}

function bestRun({ column, mode }) {
  const [first] = sortRuns(runs, column, mode === "max");
  return first && cell(first, column) !== null ? first : undefined;
}

function addBadge(status, text, parent) {
  const node = addElement("span", text, parent);
  node.className = "badge";
  node.dataset.status = status;
}

function buildTable() {
  const head = document.querySelector("#table thead tr");
  const first = addElement("th", "", head);
  first.title = "draw the run's curve";
  first.setAttribute("aria-label", "curve");
  columns.forEach((column) => {
    const header = addElement("th", "", head);
    header.scope = "col";
    header.dataset.column = column;
    header.classList.toggle("key", Object.hasOwn(keys, column));
    header.classList.toggle("number", isNumeric(column));
    addElement("button", column, header).addEventListener("click", () => sortBy(column));
  });
  const numeric = new Set(columns.filter(isNumeric));
  runs.forEach((run) => buildRow(run, numeric));
  goals.map(bestRun).forEach((run) => run?.row.classList.add("best"));
  element("filter").addEventListener("input", applyFilter);
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
  run.row = addElement("tr", "", document.querySelector("#table tbody"));
  run.box = addElement("input", "", addElement("td", "", run.row));
  run.box.type = "checkbox";
  run.box.disabled = Object.keys(run.curves).length === 0;
  run.box.style.accentColor = run.color;
  run.box.setAttribute("aria-label", `curve of ${run.label}`);
  run.box.addEventListener("change", () => {
    run.selected = run.box.checked;
    drawCurves();
  });
  columns.forEach((column) => buildCell(run, column, numeric.has(column)));
}

function buildCell(run, column, numeric) {
  const value = cell(run, column);
  const node = addElement("td", "", run.row);
  node.className = numeric ? "number" : column === "error" ? "error" : "";
  if (value === null) return;
  node.title = value;
  if (column === "status") addBadge(value, value, node);
  else if (column === "folder") addElement("a", value, node).href = run.link;
  else node.textContent = formatValue(value, column);
}

function cell(run, column) {
  return run.cells[columns.indexOf(column)] ?? null;
}

function formatValue(value, column) {
  if (typeof value !== "number") return String(value);
  if (column.endsWith("_bytes")) return formatBytes(value);
  if (Number.isInteger(value)) return String(value);
  if (Math.abs(value) >= 1000) return value.toFixed(0);
  const digits = value.toPrecision(4);
  return Object.hasOwn(keys, column) ? String(Number(digits)) : digits;
}

function formatBytes(value) {
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
  const order = sortRuns(runs, sorting.column, sorting.descending);
  document.querySelector("#table tbody").append(...order.map((run) => run.row));
  for (const header of document.querySelectorAll("#table th[data-column]")) {
    const direction = sorting.descending ? "descending" : "ascending";
    header.ariaSort = header.dataset.column === sorting.column ? direction : "none";
  }
}

// Numbers sort before texts; missing values come last in both directions.
function sortRuns(unsorted, column, descending) {
  const sign = descending ? -1 : 1;
  const present = unsorted.filter((run) => cell(run, column) !== null);
  const missing = unsorted.filter((run) => cell(run, column) === null);
  present.sort((a, b) => sign * compareValues(cell(a, column), cell(b, column)));
  return [...present, ...missing];
}

function compareValues(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;
  if (typeof b === "number") return 1;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function applyFilter() {
  const words = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const run of runs) {
    run.shown = words.every((word) => matches(run, word));
    run.row.hidden = !run.shown;
  }
  showCount();
  drawKeys();
}

// `status:fail` searches for text in a column, `model=mlp` for a value; `lr` is short for
// `optimizer.lr`. A word without the name of a column is searched for in all columns.
function matches(run, word) {
  const [, name, operator, wanted] = word.match(/^([^=:]+)([=:])(.*)$/) ?? [];
  const column = columns.find((full) => `.${full.toLowerCase()}`.endsWith(`.${name}`));
  if (column === undefined) return run.text.includes(word);
  const value = cell(run, column);
  const text = String(value).toLowerCase();
  if (operator === ":" || wanted === "") return text.includes(wanted);
  return text === wanted || Number(wanted) === value;
}

function showCount() {
  const count = runs.filter((run) => run.shown).length;
  element("shown").textContent = runs.length ? `${count} of ${runs.length}` : "";
}

function setUpControls() {
  fillSelect(element("quantity"), quantities());
  if (goal && quantities().includes(goal.quantity)) element("quantity").value = goal.quantity;
  fillSelect(element("key"), Object.keys(keys));
  fillSelect(element("goal"), goals.map(({ metric }) => metric));
  element("goal").parentElement.hidden = goals.length < 2;
  element("quantity").addEventListener("change", drawCurves);
  element("log").addEventListener("change", drawCurves);
  element("key").addEventListener("change", drawKeys);
  element("goal").addEventListener("change", drawKeys);
  element("all").addEventListener("click", () => selectRuns(runs.filter((run) => run.shown)));
  element("none").addEventListener("click", () => selectRuns([]));
  element("best10").addEventListener("click", selectBest);
}

function fillSelect(select, names) {
  for (const name of names) addElement("option", name, select).value = name;
  select.parentElement.hidden = names.length === 0;
}

function quantities() {
  const names = new Set();
  for (const run of runs) {
    for (const [stage, values] of Object.entries(run.curves)) {
      for (const name of Object.keys(values)) if (!POSITIONS.includes(name)) names.add(`${stage}/${name}`);
    }
  }
  return [...names];
}

function selectBest() {
  selectRuns(ranked.filter((run) => run.shown && !run.box.disabled).slice(0, MAX_LABELED));
}

function selectRuns(selection) {
  for (const run of runs) {
    run.selected = selection.includes(run) && !run.box.disabled;
    run.box.checked = run.selected;
  }
  drawCurves();
}

function drawCurves() {
  const quantity = element("quantity").value;
  const stage = quantity.split("/", 1)[0];
  const name = quantity.slice(stage.length + 1);
  const type = element("log").checked ? "log" : "linear";
  const best = goal && bestRun(goal);
  // The best run is drawn last, so that it is on top.
  const drawn = ranked.filter((run) => run.curves[stage]?.[name]).reverse();
  // Runs that validate within epochs are drawn over optimizer steps.
  const position = drawn.some((run) => run.curves[stage].step) ? "step" : "epoch";
  const traces = drawn.map((run) => ({
    type: "scatter",
    mode: run.curves[stage].epoch.length > 40 ? "lines" : "lines+markers",
    x: run.curves[stage][position] ?? [],
    y: run.curves[stage][name],
    name: shorten(run.label),
    meta: escapeTags(run.label),
    hovertemplate: `%{meta}<br>${position} %{x}: %{y:.5~g}<extra></extra>`,
    line: { color: run.color, width: run === best ? 3.5 : 1.5 },
    marker: { color: run.color, size: run === best ? 7 : 5 },
    visible: run.selected,
  }));
  const visible = traces.filter((trace) => trace.visible);
  const hasLegend = visible.length <= MAX_LABELED && window.innerWidth > 900;
  element("curves-note").hidden = traces.length > 0;
  const last = Math.max(0, ...traces.map((trace) => trace.x.at(-1) ?? 0));
  const ticks = last <= 20 ? { dtick: 1 } : {}; // no ticks between epochs
  drawPlot("curves", traces.length > 0, traces, {
    xaxis: { title: { text: position }, tickformat: "d", ...ticks },
    yaxis: { title: { text: escapeTags(quantity) }, type },
    showlegend: hasLegend,
    legend: { traceorder: "reversed", itemclick: false, itemdoubleclick: false },
    uirevision: `${type} ${quantity}`, // keeps the zoom when runs are selected
  });
}

function drawKeys() {
  const selected = goals.find(({ metric }) => metric === element("goal").value);
  const shown = runs.filter((run) => run.shown && selected && cell(run, selected.column) !== null);
  const drawable = shown.length > 0 && Object.keys(keys).length > 0;
  element("keys-note").hidden = drawable;
  element("scatter-note").hidden = element("parallel-note").hidden = !drawable;
  drawPlot("scatter", drawable, ...(drawable ? scatterPlot(shown, selected) : []));
  drawPlot("parallel", drawable, ...(drawable ? parallelPlot(shown, selected) : []));
}

function scatterPlot(shown, { metric, column, mode }) {
  const key = element("key").value;
  const { scale, values } = keys[key];
  const best = bestRun({ column, mode });
  const suffix = (run) => (cell(run, "status") === "completed" ? "" : "-open");
  const symbol = (run) => (run === best ? "star" : "circle") + suffix(run);
  const trace = {
    type: "scatter",
    mode: "markers",
    x: shown.map((run) => escapeTags(values[run.index])),
    y: shown.map((run) => cell(run, column)),
    text: shown.map((run) => escapeTags(run.label)),
    hovertemplate: "%{text}<br>%{y:.5~g}<extra></extra>",
    marker: {
      color: cssColor("--accent"),
      opacity: 0.75,
      size: shown.map((run) => (run === best ? 16 : 9)),
      symbol: shown.map(symbol),
      line: { color: cssColor("--panel"), width: 1 },
    },
  };
  const tickValues = ticks(keys[key], shown);
  const xaxis = {
    title: { text: escapeTags(key) },
    type: scale,
    tickvals: tickValues?.map(escapeTags),
    ticktext: tickValues?.map((value) => shorten(formatValue(value, key))),
  };
  return [[trace], { xaxis, yaxis: { title: { text: escapeTags(`best ${metric}`) } } }];
}

// Parallel coordinates as plain lines: Plotly's own need WebGL, and have no hover text for a run.
function parallelPlot(shown, { metric, column, mode }) {
  const best = bestRun({ column, mode });
  const axes = Object.entries(keys).map(([key, axis]) => keyAxis(key, axis, shown));
  const values = shown.map((run) => cell(run, column));
  const valueOf = (run) => cell(run, column);
  axes.push(parallelAxis(`best ${metric}`, valueOf, (value) => value, values, evenTicks(values)));
  const order = sortRuns(shown, column, mode === "min"); // the best run last, on top
  const traces = order.map((run, rank) => ({
    type: "scatter",
    mode: "lines+markers",
    x: axes.map((_, index) => index),
    y: axes.map((axis) => axis.height(run)),
    meta: escapeTags(`${run.label}, ${metric}=${formatValue(cell(run, column), column)}`),
    hovertemplate: "%{meta}<extra></extra>",
    line: {
      color: cssColor(["--worst", "--middle", "--best"][Math.floor((3 * rank) / order.length)]),
      width: run === best ? 4 : 1.5,
    },
    marker: { size: 4 },
    opacity: 0.8,
  }));
  return [traces, parallelLayout(axes)];
}

function keyAxis(key, axis, shown) {
  const values = distinctValues(axis, shown);
  const toNumber = {
    category: (value) => values.indexOf(value),
    log: (value) => Math.log10(value),
    linear: (value) => value,
  }[axis.scale];
  const tickValues = axis.scale === "category" ? values : ticks(axis, shown) ?? evenTicks(values);
  return parallelAxis(key, (run) => axis.values[run.index], toNumber, values, tickValues);
}

// An axis from 0 to 1: the height of a run's value on it, and its ticks.
function parallelAxis(label, valueOf, toNumber, values, tickValues) {
  const low = Math.min(...values.map(toNumber));
  const high = Math.max(...values.map(toNumber));
  const height = (value) => {
    if (value === null) return null;
    return high > low ? (toNumber(value) - low) / (high - low) : 0.5;
  };
  return {
    label,
    height: (run) => height(valueOf(run)),
    ticks: tickValues.map((value) => ({
      y: height(value),
      text: shorten(formatValue(value, label)),
    })),
  };
}

function parallelLayout(axes) {
  const line = { color: cssColor("--soft"), width: 1 };
  const tick = { showarrow: false, font: { size: 11 }, bgcolor: cssColor("--panel"), opacity: 0.85 };
  const left = { ...tick, xanchor: "right", xshift: -6 };
  const right = { ...tick, xanchor: "left", xshift: 6 };
  const side = (x) => (x === axes.length - 1 ? right : left);
  return {
    xaxis: {
      side: "top",
      showgrid: false,
      range: [-0.4, axes.length - 0.6],
      tickvals: axes.map((_, x) => x),
      ticktext: axes.map((axis) => shorten(axis.label)),
    },
    yaxis: { visible: false, range: [-0.05, 1.05] },
    shapes: axes.map((_, x) => ({ type: "line", layer: "below", x0: x, x1: x, y0: 0, y1: 1, line })),
    annotations: axes.flatMap((axis, x) => axis.ticks.map((each) => ({ ...side(x), ...each, x }))),
    showlegend: false,
    margin: { l: 20, r: 20, t: 40, b: 20 },
  };
}

function evenTicks(values) {
  const low = Math.min(...values);
  const step = (Math.max(...values) - low) / 4;
  return step > 0 ? [0, 1, 2, 3, 4].map((count) => low + count * step) : [low];
}

// Ticks are the swept values if there are few of them, else the decades of a logarithmic axis;
// undefined leaves the choice to Plotly.
function ticks(axis, shown) {
  const values = distinctValues(axis, shown);
  if (values.length <= MAX_LABELED) return values;
  return axis.scale === "log" ? decades(values) : undefined;
}

function distinctValues({ values }, shown) {
  const present = shown.map((run) => values[run.index]).filter((value) => value !== null);
  return [...new Set(present)];
}

function decades(values) {
  const first = Math.ceil(Math.log10(Math.min(...values)));
  const last = Math.floor(Math.log10(Math.max(...values)));
  return Array.from({ length: last - first + 1 }, (_, step) => Number(`1e${first + step}`));
}

function drawFigures() {
  element("figures").hidden = Object.keys(figures).length === 0;
  Object.entries(figures).forEach(([heading, figure], index) => {
    const id = `figure-${index}`;
    if (!element(id)) {
      addElement("h3", heading, element("figures"));
      Object.assign(addElement("div", "", element("figures")), { id, className: "plot" });
    }
    // The figure's own size and title do not fit the page; `drawPlot` replaces its colors.
    const layout = { ...figure.layout, width: undefined, title: undefined };
    drawPlot(id, true, figure.data, layout);
  });
}

// Hides the plot if there is nothing to draw.
function drawPlot(id, drawable, traces, layout) {
  const node = element(id);
  node.hidden = !drawable;
  if (!drawable) return;
  const config = { responsive: true, displaylogo: false };
  Plotly.react(node, traces, { ...layout, template: theme() }, config);
}

function theme() {
  const axis = {
    gridcolor: cssColor("--line"), zeroline: false, automargin: true, exponentformat: "power",
  };
  return {
    layout: {
      paper_bgcolor: cssColor("--panel"),
      plot_bgcolor: cssColor("--panel"),
      font: { color: cssColor("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
      colorway: COLORS,
      hovermode: "closest",
      hoverlabel: { align: "left" },
      margin: { l: 60, r: 20, t: 20, b: 50 },
      xaxis: axis,
      yaxis: axis,
    },
  };
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Plotly interprets tags such as <b> and <a> in its texts.
function escapeTags(value) {
  if (typeof value !== "string") return value;
  return value.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

// A long name in a legend would leave no room for the plot.
function shorten(text) {
  return escapeTags(text.length > 45 ? `${text.slice(0, 44)}…` : text);
}
