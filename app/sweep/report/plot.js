"use strict";

// Plots as SVG: lines and points over linear, logarithmic or categorical axes. The nearest point
// has a hover text, dragging zooms, and a double click shows everything again. Texts may be
// anything, so they reach the page through `textContent` only.
//
// A plot is { x, y, series, marks, legend, zoomKey }: axes, what is drawn from the first to the
// last, texts in the plot, whether to list the labels, and a text that changes when the zoom no
// longer fits. An axis is { title, scale, ticks, integer, top, range, hidden }; only `scale` is
// required: linear, log or category.
// A series is { x, y, label, labels, color, width, size, symbol, opacity }: a line of that width
// (none if it is 0), and symbols of that size (circle, open or star); `labels` are of its points.

const SVG = "http://www.w3.org/2000/svg";
const HOVER_DISTANCE = 30; // pixels, as all lengths
const MIN_DRAG = 6;
const CHARACTER_WIDTH = 7;
const MAX_TICK_LENGTH = 24; // characters
const PADDING = 0.04; // of an axis beyond its values

const resizes = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.clientWidth !== target.drawnWidth) render(target);
});

function drawPlot(node, plot) {
  if (!node.zoom || node.plot.zoomKey !== plot.zoomKey) node.zoom = {};
  node.plot = plot;
  render(node);
  resizes.observe(node);
}

function render(node) {
  const { plot, zoom } = node;
  const legend = plot.legend && node.clientWidth > 700 ? [makeLegend(plot.series)] : [];
  const svg = svgElement("svg", { role: "img", "aria-label": plot.y.title ?? plot.x.title ?? "" });
  const hover = document.createElement("div");
  hover.className = "hover";
  hover.hidden = true;
  node.replaceChildren(svg, ...legend, hover);
  node.drawnWidth = node.clientWidth;
  const y = makeScale(plot.y, plot.series.map((each) => each.y), zoom.y, svg.clientHeight);
  const x = makeScale(plot.x, plot.series.map((each) => each.x), zoom.x, svg.clientWidth);
  const area = plotArea(svg, plot, y);
  drawAxes(svg, plot, area, x, y);
  const inner = svgElement("svg", area, svg); // clips what is outside
  const points = plot.series.map((each) => drawSeries(inner, each, area, x, y));
  for (const mark of plot.marks ?? []) drawMark(svg, mark, area, x, y);
  const ring = svgElement("circle", { class: "ring", r: 7, visibility: "hidden" }, inner);
  addHover(node, svg, area, points, hover, ring);
  addZoom(node, svg, area, x, y);
}

function svgElement(tag, attributes, parent) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent?.append(node);
  return node;
}

function svgText(text, attributes, parent) {
  svgElement("text", attributes, parent).textContent = text;
}

function makeLegend(series) {
  const list = document.createElement("ul");
  list.className = "legend";
  for (const { label, color } of [...series].reverse()) {
    const item = document.createElement("li");
    item.textContent = item.title = label;
    item.style.setProperty("--color", color);
    list.append(item);
  }
  return list;
}

function plotArea(svg, plot, y) {
  const lengths = y.ticks.map(({ text }) => shorten(text).length);
  const left = plot.y.hidden ? 16 : 40 + CHARACTER_WIDTH * Math.max(1, ...lengths);
  const top = plot.x.top ? 34 : 14;
  const bottom = plot.x.top ? 14 : 48;
  const width = Math.max(20, svg.clientWidth - left - 16);
  return { x: left, y: top, width, height: Math.max(20, svg.clientHeight - top - bottom) };
}

// A scale gives the place of a value between 0 and 1, NaN for one that it cannot show.
function makeScale(axis, columns, zoom, length) {
  const categories = axis.scale === "category" ? axis.ticks ?? distinct(columns.flat()) : [];
  const indices = new Map(categories.map((value, index) => [value, index]));
  const toNumber = {
    category: (value) => indices.get(value) ?? NaN,
    log: (value) => (value > 0 ? Math.log10(value) : NaN),
    linear: (value) => value ?? NaN,
  }[axis.scale];
  const [low, high] = zoom ?? axis.range ?? paddedRange(columns, toNumber, axis.scale);
  const place = (value) => (toNumber(value) - low) / (high - low);
  const count = Math.max(2, Math.floor(length / 75));
  const values = axis.scale === "category" ? categories : makeTicks(axis, low, high, count);
  const ticks = (axis.ticks ?? values)
    .map((value) => ({ place: place(value), text: tickText(value) }))
    .filter((tick) => tick.place > -0.001 && tick.place < 1.001);
  return {
    ticks,
    place,
    number: (fraction) => low + fraction * (high - low),
  };
}

function distinct(values) {
  return [...new Set(values.filter((value) => value !== null && value !== undefined))];
}

function paddedRange(columns, toNumber, scale) {
  let low = Infinity;
  let high = -Infinity;
  for (const column of columns) {
    for (const value of column) {
      const number = toNumber(value);
      if (number < low) low = number;
      if (number > high) high = number;
    }
  }
  if (low > high) return [0, 1]; // there are no values
  if (scale === "category") return [low - 0.5, high + 0.5];
  const padding = PADDING * (high - low) || (scale === "log" ? 0.5 : Math.abs(low) / 10 || 0.5);
  return [low - padding, high + padding];
}

// Steps of 1, 2 or 5 times a power of ten; decades, or some of their multiples, on a logarithm.
function makeTicks({ scale, integer }, low, high, count) {
  if (scale === "log") {
    const decades = range(Math.floor(low), Math.ceil(high), Math.ceil((high - low) / count));
    const factors = high - low < 1.5 ? [1, 2, 5] : [1];
    return decades.flatMap((power) => factors.map((factor) => Number(`${factor}e${power}`)));
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const whole = integer ? Math.max(1, Math.round(step)) : step;
  return range(Math.ceil(low / whole), Math.floor(high / whole), 1).map((each) => each * whole);
}

function range(first, last, step) {
  const length = Math.max(0, Math.floor((last - first) / step) + 1);
  return Array.from({ length }, (_, index) => first + index * step);
}

function tickText(value) {
  return typeof value === "number" ? formatNumber(value, 6) : String(value);
}

function formatNumber(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

function shorten(text) {
  return text.length > MAX_TICK_LENGTH ? `${text.slice(0, MAX_TICK_LENGTH - 1)}…` : text;
}

function drawAxes(svg, plot, area, x, y) {
  const places = x.ticks.map((tick) => ({ ...tick, at: area.x + tick.place * area.width }));
  const heights = plot.y.hidden ? [] : y.ticks.map((tick) => (
    { ...tick, at: area.y + (1 - tick.place) * area.height }));
  const lines = [
    ...places.map(({ at }) => `M${at} ${area.y}v${area.height}`),
    ...heights.map(({ at }) => `M${area.x} ${at}h${area.width}`),
  ];
  svgElement("path", { class: "grid", d: lines.join("") }, svg);
  const room = area.width / Math.max(1, places.length) / CHARACTER_WIDTH; // characters per tick
  for (const { at, text } of places) {
    const short = text.length > room ? `${text.slice(0, Math.max(1, room - 1))}…` : text;
    const attributes = { class: "tick x", x: at, y: plot.x.top ? 20 : area.y + area.height + 18 };
    svgText(short, attributes, svg);
  }
  for (const { at, text } of heights) {
    svgText(shorten(text), { class: "tick y", x: area.x - 6, y: at + 4 }, svg);
  }
  const middle = { x: area.x + area.width / 2, y: area.y + area.height / 2 };
  if (plot.x.title) {
    const below = area.y + area.height + 40;
    svgText(plot.x.title, { class: "title x", x: middle.x, y: below }, svg);
  }
  if (plot.y.title && !plot.y.hidden) {
    const turned = `translate(14 ${middle.y}) rotate(-90)`;
    svgText(plot.y.title, { class: "title y", transform: turned }, svg);
  }
}

function drawMark(svg, mark, area, x, y) {
  const attributes = {
    class: "tick mark",
    x: area.x + x.place(mark.x) * area.width + (mark.anchor === "end" ? -6 : 6),
    y: area.y + (1 - y.place(mark.y)) * area.height + 4,
    "text-anchor": mark.anchor,
  };
  svgText(shorten(mark.text), attributes, svg);
}

// Draws one series, and returns its points in pixels.
function drawSeries(inner, series, area, x, y) {
  const points = series.x.map((value, index) => ({
    series,
    index,
    x: x.place(value) * area.width,
    y: (1 - y.place(series.y[index])) * area.height,
  }));
  const style = { class: "series", opacity: series.opacity ?? 1, style: `--color: ${series.color}` };
  const group = svgElement("g", style, inner);
  if (series.width) {
    const attributes = { class: "line", "stroke-width": series.width, d: linePath(points) };
    svgElement("path", attributes, group);
  }
  const shown = points.filter(isDrawable);
  if (series.size) {
    const draw = series.symbol === "star" ? starPath : circlePath;
    const d = shown.map((point) => draw(point, series.size)).join("");
    svgElement("path", { class: series.symbol ?? "circle", d }, group);
  }
  return shown;
}

function isDrawable({ x, y }) {
  return Number.isFinite(x) && Number.isFinite(y);
}

// A line with a gap wherever a value is missing.
function linePath(points) {
  let start = "M";
  let path = "";
  for (const point of points) {
    if (isDrawable(point)) path += `${start}${point.x.toFixed(1)} ${point.y.toFixed(1)}`;
    start = isDrawable(point) ? "L" : "M";
  }
  return path;
}

function circlePath({ x, y }, size) {
  const r = size / 2;
  return `M${(x - r).toFixed(1)} ${y.toFixed(1)}a${r} ${r} 0 1 0 ${size} 0a${r} ${r} 0 1 0 ${-size} 0`;
}

function starPath({ x, y }, size) {
  const corners = range(0, 9, 1).map((corner) => {
    const length = (size / 2) * (corner % 2 ? 0.4 : 1);
    const angle = (corner * Math.PI) / 5;
    return `${x + length * Math.sin(angle)} ${y - length * Math.cos(angle)}`;
  });
  return `M${corners.join("L")}Z`;
}

function addHover(node, svg, area, points, hover, ring) {
  const hide = () => {
    hover.hidden = true;
    ring.setAttribute("visibility", "hidden");
  };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const at = pixels(svg, area, event);
    const point = nearest(points, at);
    if (!point) return hide();
    hover.textContent = hoverText(node.plot, point);
    hover.hidden = false;
    const [left, top] = [area.x + point.x, area.y + point.y];
    hover.style.left = `${Math.max(0, Math.min(left + 12, svg.clientWidth - hover.offsetWidth))}px`;
    hover.style.top = `${top > hover.offsetHeight + 12 ? top - hover.offsetHeight - 10 : top + 12}px`;
    ring.setAttribute("cx", point.x);
    ring.setAttribute("cy", point.y);
    ring.setAttribute("visibility", "visible");
    return undefined;
  });
}

function pixels(svg, area, event) {
  const box = svg.getBoundingClientRect();
  return { x: event.clientX - box.left - area.x, y: event.clientY - box.top - area.y };
}

function nearest(series, { x, y }) {
  let best;
  let least = HOVER_DISTANCE ** 2;
  for (const points of series) {
    for (const point of points) {
      const distance = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (distance <= least) [best, least] = [point, distance]; // of equals, the one on top
    }
  }
  return best;
}

function hoverText({ x, y, hover }, { series, index }) {
  const label = series.labels?.[index] ?? series.label;
  if (hover === "label") return label;
  const values = [[x, series.x[index]], [y, series.y[index]]].map(([{ title }, value]) => (
    `${title}: ${typeof value === "number" ? formatNumber(value, 5) : value}`));
  return [label, ...values].filter(Boolean).join("\n");
}

function addZoom(node, svg, area, x, y) {
  let start;
  let box;
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = pixels(svg, area, event);
    box = svgElement("rect", { class: "zoom" }, svg);
    svg.setPointerCapture(event.pointerId);
    event.preventDefault(); // no text is selected
  });
  svg.addEventListener("pointermove", (event) => {
    if (!start) return;
    const [left, right, top, bottom] = dragged(start, pixels(svg, area, event), area);
    const place = { x: area.x + left, y: area.y + top, width: right - left, height: bottom - top };
    for (const [name, value] of Object.entries(place)) box.setAttribute(name, value);
  });
  svg.addEventListener("pointerup", (event) => {
    if (!start) return;
    const [left, right, top, bottom] = dragged(start, pixels(svg, area, event), area);
    start = undefined;
    box.remove();
    if (right - left < MIN_DRAG || bottom - top < MIN_DRAG) return;
    node.zoom = {
      x: [x.number(left / area.width), x.number(right / area.width)],
      y: [y.number(1 - bottom / area.height), y.number(1 - top / area.height)],
    };
    render(node);
  });
  svg.addEventListener("dblclick", () => {
    node.zoom = {};
    render(node);
  });
}

function dragged(start, end, { width, height }) {
  const inside = (value, size) => Math.max(0, Math.min(size, value));
  const xs = [inside(start.x, width), inside(end.x, width)].sort((a, b) => a - b);
  const ys = [inside(start.y, height), inside(end.y, height)].sort((a, b) => a - b);
  return [...xs, ...ys];
}
