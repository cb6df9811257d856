// The table of modules: sorted by any column, filtered by name, a few rows until more are asked for.
const ROWS_AT_ONCE = 15;

function homeCell(home) {
  const whole = Object.values(home).reduce((a, b) => a + b, 0);
  const held = Object.entries(home).filter(([, bytes]) => bytes > 0).sort((a, b) => b[1] - a[1]);
  const words = { host: "memory", device: "GPU", disk: "disk" };
  const meter = element("span", { class: "meter", "aria-hidden": "true" });
  for (const [tier, bytes] of held) {
    meter.append(element("i", { class: "k-" + tier, style: `width:${(100 * bytes) / whole}%` }));
  }
  const text = held.map(([tier, bytes]) => `${Math.round((100 * bytes) / whole)}% ${words[tier] ?? tier}`);
  return element("td", {}, element("span", { class: "home" }, meter, text.join(", ") || "nowhere"));
}

function cell(column, value, most) {
  if (column.kind === "home") return homeCell(value);
  if (column.kind === "text") return element("th", { scope: "row", class: "name", title: value }, value);
  const text = column.kind === "bytes" ? sizeText(value) : secondsText(value);
  if (column.kind !== "stall") return element("td", { class: "num" }, text);
  const bar = element("i", { class: "k-stall", style: `width:${most ? (100 * value) / most : 0}%` });
  const meter = element("span", { class: "meter", "aria-hidden": "true" }, bar);
  return element("td", { class: value > 0 ? "num stalled" : "num" }, text, meter);
}

// How a value is ordered: the home of a module by the part of it that is on disk.
function orderOf(column, value) {
  if (column.kind !== "home") return value;
  const whole = Object.values(value).reduce((a, b) => a + b, 0);
  return whole ? (value.disk ?? 0) / whole : 0;
}

class ModuleTable {
  constructor(root, { columns, rows, sort }) {
    this.columns = columns;
    this.rows = rows;
    this.sort = { key: sort, down: true };
    this.shown = ROWS_AT_ONCE;
    this.parts = {
      head: root.querySelector("thead tr"), body: root.querySelector("tbody"), foot: root.querySelector("tfoot tr"),
      filter: root.querySelector("input[type=search]"), waiting: root.querySelector("input[type=checkbox]"),
      status: root.querySelector("[role=status]"), more: root.querySelector("button.more"),
    };
    this.most = Object.fromEntries(columns.filter((c) => c.kind === "stall").map((c) => [c.key, rows[c.key].reduce((a, b) => Math.max(a, b), 0)]));
    this.wire();
    this.draw();
  }

  wire() {
    const { head, filter, waiting, more } = this.parts;
    for (const column of this.columns) {
      const button = element("button", { type: "button", title: column.tip }, column.label);
      button.addEventListener("click", () => this.sortBy(column));
      const side = ["text", "home"].includes(column.kind) ? "" : "num";
      head.append(element("th", { scope: "col", class: side, "data-key": column.key }, button));
    }
    const again = () => { this.shown = ROWS_AT_ONCE; this.draw(); };
    filter.addEventListener("input", again);
    waiting.addEventListener("change", again);
    more.addEventListener("click", () => { this.shown *= 4; this.draw(); });
  }

  sortBy({ key, kind }) {
    const same = this.sort.key === key;
    this.sort = { key, down: same ? !this.sort.down : kind !== "text" };
    this.draw();
  }

  // The numbers of the rows that pass the filter, in order.
  chosen() {
    const wanted = this.parts.filter.value.trim().toLowerCase().split(/\s+/);
    const waits = this.columns.filter((c) => c.kind === "stall").map((c) => this.rows[c.key]);
    const passes = (i) => wanted.every((word) => this.rows.name[i].toLowerCase().includes(word))
      && (!this.parts.waiting.checked || waits.some((values) => values[i] > 0));
    const column = this.columns.find((c) => c.key === this.sort.key);
    const keys = this.rows[column.key].map((value) => orderOf(column, value));
    const names = new Intl.Collator("en", { numeric: true });
    const compare = column.kind === "text" ? (a, b) => names.compare(keys[a], keys[b]) : (a, b) => keys[a] - keys[b];
    const sign = this.sort.down ? -1 : 1;
    return this.rows.name.map((_, i) => i).filter(passes).sort((a, b) => sign * compare(a, b) || a - b);
  }

  draw() {
    const { head, body, more, status } = this.parts;
    const chosen = this.chosen();
    for (const th of head.children) {
      if (th.dataset.key === this.sort.key) th.setAttribute("aria-sort", this.sort.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
    body.replaceChildren(...chosen.slice(0, this.shown).map((i) => element("tr", {}, ...this.columns.map((c) => cell(c, this.rows[c.key][i], this.most[c.key])))));
    const left = chosen.length - this.shown;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(left, 3 * this.shown).toLocaleString("en")} more`;
    const all = this.rows.name.length;
    status.textContent = chosen.length === all ? `${all.toLocaleString("en")} modules` : `${chosen.length.toLocaleString("en")} of ${all.toLocaleString("en")} modules`;
    this.drawSums(chosen);
  }

  drawSums(chosen) {
    const sum = (values) => chosen.reduce((total, i) => total + values[i], 0);
    this.parts.foot.replaceChildren(...this.columns.map((column) => {
      if (column.kind === "text") return element("td", {}, "Together");
      if (column.kind === "home") return element("td", {});
      const text = column.kind === "bytes" ? sizeText : secondsText;
      return element("td", { class: "num" }, text(sum(this.rows[column.key])));
    }));
  }
}
