// Draws the charts, gives them the page's colours, and zooms the clock that they share.
const page = JSON.parse(document.getElementById("page-data").textContent);
const probe = document.body.appendChild(element("span", { hidden: "" }));
const PHASE_LETTER_PX = 6.5;
let plots = [];

function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

// The colour of what a chart calls by this name: kind:weights, line:a, stall ...
function colourOf(name) {
  const [group, which] = name.split(":");
  if (group === "kind") return colour(which);
  if (group === "line") return colour(which === "b" ? "ink" : "accent");
  return colour(group === "stall-band" ? "stall" : group === "phase-edge" ? "line" : group);
}

function paint(plot) {
  const soft = colour("soft");
  for (const axis of [...plot.left, ...plot.below]) {
    axis.setv({ major_label_text_color: soft, axis_label_text_color: soft, axis_label_text_font_style: "normal", axis_label_text_font_size: "11px" });
  }
  for (const part of plot.center) {
    if (part.type === "Grid") part.setv({ grid_line_color: colour("line") });
    if (part.type === "Label") part.setv({ text_color: part.name === "peak-label" ? colour("ink") : soft });
    if (part.type === "Span") part.setv({ line_color: part.name === "budget" ? colour("ink") : colour("line") });
  }
  for (const renderer of plot.renderers) paintGlyph(renderer);
}

function paintGlyph({ name, glyph }) {
  if (name === "phase-label") return glyph.setv({ text_color: { value: colour("soft") } });
  const ink = name.startsWith("peak") ? colour("ink") : colourOf(name);
  const look = {};
  if ("fill_color" in glyph.properties) look.fill_color = { value: name === "peak-dot" ? colour("card") : ink };
  if (name === "stall-band") look.fill_alpha = { value: 0.13 };
  if ("line_color" in glyph.properties) {
    const outlined = name.startsWith("line:") || name.startsWith("peak");
    look.line_color = { value: outlined ? ink : null };
  }
  if (name.startsWith("kind:") && glyph.type === "VAreaStep") look.fill_color = ink;
  if (glyph.type === "Line" || glyph.type === "VAreaStep") delete look[glyph.type === "Line" ? "fill_color" : "line_color"];
  if (glyph.type === "Line") look.line_color = ink;
  glyph.setv(look);
}

function chartElement(plot) {
  return document.getElementById("chart-" + plot.name);
}

// The window of time that is shown: from, to, and the whole.
function clockOf() {
  const plot = plots.find((p) => p.x_range.name === "clock");
  return plot ? plot.x_range : null;
}

function showTime(start, end) {
  const range = clockOf();
  const whole = range.bounds[1];
  const width = Math.min(whole, Math.max(end - start, whole * 1e-5));
  const from = Math.min(Math.max(0, start), whole - width);
  range.setv({ start: from, end: from + width });
  tellWindow();
}

function zoom(how) {
  const { start, end, bounds } = clockOf();
  const width = end - start;
  const middle = (start + end) / 2;
  const next = {
    in: [middle - width / 4, middle + width / 4],
    out: [middle - width, middle + width],
    earlier: [start - width / 2, end - width / 2],
    later: [start + width / 2, end + width / 2],
    reset: [0, bounds[1]],
  }[how];
  showTime(next[0], next[1]);
}

// Names of phases stand in the middle of what is seen of them, if there is room.
function namePhases(plot) {
  const named = (name) => plot.renderers.find((r) => r.name === name);
  if (!named("phase-label")) return;
  const { start, end } = plot.x_range;
  const { left, right, name } = named("phase").data_source.data;
  const shown = { x: [], text: [] };
  for (let i = 0; i < name.length; i++) {
    const from = Math.max(start, left[i]);
    const to = Math.min(end, right[i]);
    const room = ((to - from) / (end - start)) * (plot.inner_width || 300);
    if (room < 12 + PHASE_LETTER_PX * name[i].length) continue;
    shown.x.push((from + to) / 2);
    shown.text.push(name[i]);
  }
  named("phase-label").data_source.data = shown;
}

function tellWindow() {
  plots.forEach(namePhases);
  const { start, end, bounds } = clockOf();
  const whole = bounds[1];
  const all = end - start > 0.999 * whole;
  const text = all ? "The whole step" : `${momentText(start, end - start)} to ${momentText(end, end - start)}`;
  for (const output of document.querySelectorAll(".zoom output")) output.textContent = text;
}

function wireZoom() {
  for (const button of document.querySelectorAll("button[data-zoom]")) {
    button.addEventListener("click", () => zoom(button.dataset.zoom));
  }
  for (const button of document.querySelectorAll("button[data-from]")) {
    button.addEventListener("click", () => {
      const from = Number(button.dataset.from);
      const took = Number(button.dataset.to) - from;
      showTime(from - 2 * took, from + 3 * took);
      document.getElementById("lanes").scrollIntoView();
    });
  }
  for (const plot of plots.filter((p) => p.x_range.name === "clock")) {
    plot.on_event("rangesupdate", tellWindow);
    plot.on_event("doubletap", () => zoom("reset"));
  }
  if (clockOf()) tellWindow();
  addEventListener("resize", () => setTimeout(() => plots.forEach(namePhases), 300));
}

async function drawCharts() {
  const { document: documentJson, elements } = page.charts;
  const ids = Object.keys(elements);
  if (!ids.length) return;
  await Bokeh.embed.embed_items({ all: documentJson }, [{ docid: "all", root_ids: ids, roots: elements }]);
  plots = Bokeh.documents[0].roots();
  plots.forEach(paint);
}
