// Names, values and errors come from users, so they reach the page as text only: through
// `textContent` and `title`, never as HTML.

const content = JSON.parse(element("content").textContent);
const { columns, keys, goals, figures } = content;

const COLORS = [
  "#4269d0", "#e8a317", "#f2635b", "#3ca951", "#a463f2",
  "#2fb5a5", "#f07cac", "#9c6b4e", "#5fa8f0", "#8b929c",
];
const POSITIONS = ["epoch", "step"]; // columns that are no quantities
const MAX_LABELED = 10; // curves to draw at first, legend entries, and ticks of swept values

const columnIndex = new Map(columns.map((column, index) => [column, index]));
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
  return run.cells[columnIndex.get(column)] ?? null;
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
  const chosen = new Set(selection);
  for (const run of runs) {
    run.selected = chosen.has(run) && !run.box.disabled;
    run.box.checked = run.selected;
  }
  drawCurves();
}

function drawCurves() {
  const quantity = element("quantity").value;
  const stage = quantity.split("/", 1)[0];
  const name = quantity.slice(stage.length + 1);
  const scale = element("log").checked ? "log" : "linear";
  const best = goal && bestRun(goal);
  const drawable = ranked.filter((run) => run.curves[stage]?.[name]);
  // Runs that validate within epochs are drawn over optimizer steps.
  const position = drawable.some((run) => run.curves[stage].step) ? "step" : "epoch";
  // The best run is drawn last, so that it is on top.
  const series = drawable.filter((run) => run.selected).reverse().map((run) => ({
    x: run.curves[stage][position] ?? [],
    y: run.curves[stage][name],
    label: run.label,
    color: run.color,
    width: run === best ? 3.5 : 1.5,
    size: run.curves[stage].epoch.length > 40 ? 0 : run === best ? 7 : 5,
  }));
  element("curves-note").hidden = drawable.length > 0;
  element("zoom-note").hidden = drawable.length === 0;
  showPlot("curves", drawable.length > 0, {
    x: { title: position, scale: "linear", integer: true },
    y: { title: quantity, scale },
    series,
    legend: series.length <= MAX_LABELED,
    zoomKey: `${scale} ${quantity}`, // keeps the zoom when runs are selected
  });
}

function drawKeys() {
  const selected = goals.find(({ metric }) => metric === element("goal").value);
  const shown = runs.filter((run) => run.shown && selected && cell(run, selected.column) !== null);
  const drawable = shown.length > 0 && Object.keys(keys).length > 0;
  element("keys-note").hidden = drawable;
  element("scatter-note").hidden = element("parallel-note").hidden = !drawable;
  showPlot("scatter", drawable, drawable && scatterPlot(shown, selected));
  showPlot("parallel", drawable, drawable && runsPlot(shown, selected));
}

function scatterPlot(shown, { metric, column, mode }) {
  const key = element("key").value;
  const { scale, values } = keys[key];
  const best = bestRun({ column, mode });
  const color = "var(--accent)";
  const points = (chosen) => ({
    x: chosen.map((run) => values[run.index]),
    y: chosen.map((run) => cell(run, column)),
    labels: chosen.map((run) => run.label),
    color,
    opacity: 0.75,
  });
  const isCompleted = (run) => cell(run, "status") === "completed";
  const others = shown.filter((run) => run !== best);
  return {
    x: { title: key, scale, ticks: fewValues(shown.map((run) => values[run.index])) },
    y: { title: `best ${metric}`, scale: "linear" },
    series: [
      { ...points(others.filter(isCompleted)), size: 9 },
      { ...points(others.filter((run) => !isCompleted(run))), size: 9, symbol: "open" },
      { ...points(shown.filter((run) => run === best)), size: 20, symbol: "star" },
    ],
    zoomKey: `${key} ${metric}`,
  };
}

function runsPlot(shown, { metric, column, mode }) {
  const axes = Object.entries(keys).map(([label, { scale, values }]) => (
    { label, scale, values: shown.map((run) => values[run.index]) }));
  const measured = shown.map((run) => cell(run, column));
  axes.push({ label: `best ${metric}`, scale: "linear", values: measured });
  const labels = shown.map((run, index) => (
    `${run.label}, ${metric}=${formatValue(measured[index], column)}`));
  return parallelPlot({ axes, labels, mode });
}

// Parallel coordinates: a line per run over axes of different scales; the last is what is compared.
function parallelPlot({ axes, labels, mode }) {
  const names = axes.map(({ label }) => label);
  const heights = axes.map((axis, index) => axisHeights(axis, index === axes.length - 1));
  const sign = mode === "max" ? 1 : -1;
  const { values } = axes.at(-1);
  const order = labels.map((_, index) => index).sort((a, b) => sign * (values[a] - values[b]));
  const series = order.map((line, rank) => ({
    x: names,
    y: heights.map(({ height }, axis) => height(axes[axis].values[line])),
    label: labels[line],
    color: ["var(--worst)", "var(--middle)", "var(--best)"][Math.floor((3 * rank) / order.length)],
    width: rank === order.length - 1 ? 4 : 1.5,
    size: 4,
    opacity: 0.8,
  }));
  const marks = heights.flatMap(({ ticks }, index) => ticks.map((tick) => (
    { ...tick, x: names[index], anchor: index === names.length - 1 ? "start" : "end" })));
  return {
    x: { scale: "category", ticks: names, top: true, range: [-0.5, names.length - 0.5] },
    y: { scale: "linear", hidden: true, range: [-0.05, 1.05] },
    series,
    marks,
    hover: "label",
    zoomKey: names.join(" "),
  };
}

// The height of a value on an axis, from 0 to 1, and the ticks of the axis: its values if they were
// chosen, and are few.
function axisHeights({ label, scale, values }, isMeasured) {
  const present = distinct(values);
  const toNumber = {
    category: (value) => present.indexOf(value),
    log: (value) => Math.log10(value),
    linear: (value) => value,
  }[scale];
  const numbers = present.map(toNumber);
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const height = (value) => {
    if (value === null) return null;
    return high > low ? (toNumber(value) - low) / (high - low) : 0.5;
  };
  const chosen = scale === "category" ? present : isMeasured ? undefined : fewValues(values);
  const ticks = (chosen ?? evenValues(scale, low, high))
    .map((value) => ({ y: height(value), text: formatValue(value, label) }));
  return { height, ticks };
}

// Ticks are the swept values if there are few of them.
function fewValues(values) {
  const present = distinct(values);
  return present.length <= MAX_LABELED ? present : undefined;
}

function evenValues(scale, low, high) {
  const numbers = [0, 1, 2, 3, 4].map((count) => low + (count * (high - low)) / 4);
  return numbers.map((number) => (scale === "log" ? 10 ** number : number));
}

function drawFigures() {
  element("figures").hidden = Object.keys(figures).length === 0;
  for (const [heading, figure] of Object.entries(figures)) {
    const block = addElement("div", "", element("figure-list"));
    addElement("h3", heading, block);
    const node = addElement("div", "", block);
    if (figure.bars) drawBars(node, figure.bars);
    else {
      node.className = "plot";
      drawPlot(node, figure.axes ? parallelPlot(figure) : figure);
    }
  }
}

function drawBars(node, bars) {
  node.className = "bars";
  for (const [name, value] of bars) {
    addElement("span", name, node).title = name;
    addElement("meter", "", node).value = value;
    addElement("span", value.toPrecision(3), node);
  }
}

// Hides the plot if there is nothing to draw.
function showPlot(id, drawable, plot) {
  element(id).hidden = !drawable;
  if (drawable) drawPlot(element(id), plot);
}
