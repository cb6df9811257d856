// What hovering shows. Near misses count, so that a span thinner than a pixel can be met.
const NEAR_PX = 4;
const MOST_NAMES = 4;
const tip = document.getElementById("tip");
const laneWords = { h2d: "Copy to GPU", d2h: "Copy from GPU", read: "Read from disk", write: "Write to disk", compute: "Compute", update: "Update" };

function runOf(plot) {
  return page.runs[/^[ab]-/.test(plot.name) ? plot.name.slice(0, 2) : ""];
}

function column(renderer, name) {
  return renderer.data_source.data[name] ?? renderer.data_source.data.get(name);
}

function tensorText(run, chunk) {
  const names = run.tensors[chunk].map((i) => run.names[i]);
  const more = names.length - MOST_NAMES;
  return names.slice(0, MOST_NAMES).join("\n") + (more > 0 ? `\nand ${more} more` : "");
}

// Of all spans in a row of the chart, the one at x, or the nearest within a few pixels.
function nearest(renderers, x, near, inRow) {
  let best = null;
  for (const renderer of renderers) {
    const left = column(renderer, "left");
    const right = column(renderer, "right");
    for (let i = 0; i < left.length; i++) {
      const off = Math.max(left[i] - x, x - right[i], 0);
      if (off <= near && (!best || off < best.off) && inRow(renderer, i)) best = { renderer, i, off };
    }
  }
  return best;
}

function rowsOfChunk(run, chunk, rows) {
  if (chunk < 0) return;
  rows.push(["Chunk", `${chunk} (${run.chunk_kind[chunk]})`], ["Tensors", tensorText(run, chunk)]);
}

function whoWaited(run, chunk, start, end) {
  const { chunk: chunks, start_s, end_s, module } = run.stalls;
  const late = 0.02 * (end - start);
  for (let i = 0; i < chunks.length; i++) {
    if (chunks[i] === chunk && start_s[i] <= end + late && end_s[i] >= start - late) {
      return `${run.modules[module[i]] ?? "the step"}, ${secondsText(end_s[i] - start_s[i])}`;
    }
  }
  return "nobody";
}

function describeSpan(plot, lane, { renderer, i }) {
  const run = runOf(plot);
  const [left, right, chunk, bytes, module] = ["left", "right", "chunk", "bytes", "module"].map((key) => column(renderer, key)[i]);
  const took = right - left;
  const rows = [];
  rowsOfChunk(run, chunk, rows);
  if (bytes > 0) {
    rows.push(["Bytes", sizeText(bytes)]);
    rows.push(["Bandwidth", (bytes / Math.max(took, 1e-9) / GIB).toFixed(2) + " GiB/s"]);
  }
  rows.push(["When", `${momentText(left, took)}, for ${secondsText(took)}`]);
  if (module >= 0) rows.push([bytes > 0 ? "For" : "Module", run.modules[module]]);
  if (chunk >= 0) rows.push(["Waited for it", whoWaited(run, chunk, left, right)]);
  return { kind: renderer.name.slice(5), title: laneWords[lane], rows };
}

function describeStall(plot, { renderer, i }) {
  const run = runOf(plot);
  const { chunk, module, cause, start_s, end_s } = run.stalls;
  const at = column(renderer, "index")[i];
  const rows = [];
  rowsOfChunk(run, chunk[at], rows);
  if (chunk[at] >= 0) rows.push(["Bytes", sizeText(run.chunk_bytes[chunk[at]])]);
  rows.push(["Who waited", run.modules[module[at]] ?? "the step"]);
  rows.push(["When", `${momentText(start_s[at], end_s[at] - start_s[at])}, for ${secondsText(end_s[at] - start_s[at])}`]);
  return { kind: "stall", title: `Stall: ${page.causes[cause[at]] ?? cause[at]}`, rows };
}

function describeLanes(plot, x, y, near) {
  const { lanes } = plot.tags[0];
  const named = (wanted) => plot.renderers.filter((r) => r.name === wanted);
  if (y >= lanes.length) {
    const phase = nearest(named("phase"), x, 0, () => true);
    if (!phase) return null;
    const took = column(phase.renderer, "right")[phase.i] - column(phase.renderer, "left")[phase.i];
    return { kind: "other", title: column(phase.renderer, "name")[phase.i], rows: [["Takes", secondsText(took)]] };
  }
  const row = Math.floor(y);
  const lane = lanes[lanes.length - 1 - row];
  const spans = plot.renderers.filter((r) => r.name.startsWith("kind:"));
  const span = nearest(spans, x, near, (r, i) => Math.floor(column(r, "y")[i]) === row);
  const stall = row === lanes.length - 1 ? nearest(named("stall"), x, near, () => true) : null;
  if (stall && (!span || stall.off <= span.off)) return describeStall(plot, stall);
  return span && describeSpan(plot, lane, span);
}

function describeMemory(plot, x) {
  const { kinds, unit_bytes } = plot.tags[0];
  const renderer = plot.renderers.find((r) => r.name.startsWith("kind:"));
  if (!renderer) return null;
  const times = column(renderer, "t");
  let at = 0;
  while (at + 1 < times.length && times[at + 1] <= x) at++;
  const tops = ["", ...kinds].map((kind) => column(renderer, "top-" + kind)[at] * unit_bytes);
  const rows = kinds.map((kind, i) => [kind, sizeText(tops[i + 1] - tops[i]), kind]).reverse();
  const budget = runOf(plot).budgets[plot.name.replace(/^([ab]-)?memory-/, "")];
  const used = tops[tops.length - 1];
  rows.push(["together", sizeText(used) + (budget ? `, ${((100 * used) / budget).toFixed(0)}% of the budget` : "")]);
  return { title: `At ${momentText(x, times[times.length - 1])}`, rows, numbers: true };
}

function describeHistory(plot, x) {
  const rows = [];
  for (const renderer of plot.renderers.filter((r) => r.glyph.type === "Line")) {
    const steps = column(renderer, "x");
    const values = column(renderer, "y");
    if (!steps.length) continue;
    let at = 0;
    for (let i = 1; i < steps.length; i++) if (Math.abs(steps[i] - x) < Math.abs(steps[at] - x)) at = i;
    const run = renderer.name.slice(5).toUpperCase();
    rows.push([`Step ${steps[at]}${run ? ", " + run : ""}`, values[at].toPrecision(4)]);
  }
  return rows.length ? { title: plot.tags[0].label, rows } : null;
}

function describe(plot, x, y) {
  const { start, end } = plot.x_range;
  if (x < start || x > end || y < plot.y_range.start || y > plot.y_range.end) return null;
  const near = (NEAR_PX * (end - start)) / (plot.inner_width || 1000);
  const { type } = plot.tags[0];
  if (type === "lanes") return describeLanes(plot, x, y, near);
  return type === "memory" ? describeMemory(plot, x) : describeHistory(plot, x);
}

function showTip(said, clientX, clientY) {
  const list = element("dl", {});
  for (const [label, value, kind] of said.rows) {
    list.append(element("dt", {}, ...(kind ? [swatch(kind)] : []), label), element("dd", said.numbers ? { class: "num" } : {}, value));
  }
  tip.replaceChildren(element("h4", {}, ...(said.kind ? [swatch(said.kind)] : []), said.title), list);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const room = document.documentElement;
  const left = clientX + 16 + width > room.clientWidth - 8 ? clientX - width - 16 : clientX + 16;
  const top = clientY + 16 + height > room.clientHeight - 8 ? clientY - height - 16 : clientY + 16;
  tip.style.left = Math.max(8, Math.min(left, room.clientWidth - width - 8)) + "px";
  tip.style.top = Math.max(8, top) + "px";
}

function wireHover() {
  for (const plot of plots) {
    const meet = ({ x, y, sx, sy }) => {
      const said = describe(plot, x, y);
      if (!said) return void (tip.hidden = true);
      const { left, top } = chartElement(plot).getBoundingClientRect();
      showTip(said, left + sx, top + sy);
    };
    plot.on_event("mousemove", meet);
    plot.on_event("tap", meet);
    plot.on_event("mouseleave", () => (tip.hidden = true));
  }
  addEventListener("scroll", () => (tip.hidden = true), { passive: true });
}
