// Parts that the page is made of: elements, numbers as people read them, tables that change in place, sparklines.
const SVG = "http://www.w3.org/2000/svg";
export const at = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const count = (n) => n == null ? "–" : n >= 1e6 ? `${(n / 1e6).toPrecision(3)}\u00a0M` : n.toLocaleString("en-US");
export const share = (part) => part == null ? "–" : `${part > 0 && part < 0.0995 ? (100 * part).toFixed(1) : Math.round(100 * part)}\u00a0%`;

export function seconds(s) {
  if (s == null) return "–";
  if (s < 0.9995) return `${(1000 * s).toFixed(s < 0.00995 ? 1 : 0)}\u00a0ms`;
  return s < 99.95 ? `${s.toFixed(s < 9.995 ? 2 : 1)}\u00a0s` : `${Math.round(s / 60)}\u00a0min`;
}

export function bytes(n) {
  if (n == null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; n >= 1000 && unit < 4; unit++) n /= 1024;
  return `${unit && n < 9.95 ? n.toFixed(1) : Math.round(n)}\u00a0${units[unit]}`;
}

export const rate = (n) => n ? `${bytes(n)}/s` : "–";

const narrow = matchMedia("(max-width: 640px)");

// A table whose rows are filled anew in place. Columns: {label, kind, set(cell, row)}; roles survive `display: grid`.
// `some`: how many rows are shown unless all are asked for, on a wide and on a narrow screen.
export class Table {
  constructor(place, caption, columns, empty, some = [Infinity, Infinity]) {
    this.columns = columns;
    this.some = some;
    this.all = make("button", { type: "button", class: "all", "aria-expanded": "false" });
    this.all.addEventListener("click", () => {
      this.all.setAttribute("aria-expanded", this.all.getAttribute("aria-expanded") === "false");
      this.fill(...this.last);
    });
    this.body = make("tbody", { role: "rowgroup" });
    const heads = columns.map((c) => make("th", { scope: "col", role: "columnheader", class: c.kind }, c.label));
    this.table = make("table", { role: "table", class: "rows" },
      make("caption", { class: "unseen" }, caption),
      make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), this.body);
    this.empty = make("p", { class: "empty" }, empty);
    place.replaceChildren(make("div", { class: "scroll" }, this.table), this.empty, this.all);
  }

  fill(every, mark = () => false) {
    this.last = [every, mark];
    const some = this.some[narrow.matches ? 1 : 0], expanded = this.all.getAttribute("aria-expanded") === "true";
    const rows = expanded ? every : every.slice(0, some);
    this.all.hidden = every.length <= some;
    say(this.all, expanded ? `Show ${some} only` : `Show all ${every.length}`);
    this.table.hidden = !rows.length;
    this.empty.hidden = rows.length > 0;
    while (this.body.rows.length > rows.length) this.body.deleteRow(-1);
    while (this.body.rows.length < rows.length) {
      this.body.append(make("tr", { role: "row" }, ...this.columns.map((c, i) =>
        make(i ? "td" : "th", { role: i ? "cell" : "rowheader", scope: i ? null : "row", class: c.kind, "data-label": c.label }))));
    }
    rows.forEach((row, i) => {
      const line = this.body.rows[i];
      line.classList.toggle("mine", mark(row));
      this.columns.forEach((c, j) => c.set(line.cells[j], row));
    });
  }
}

export const text = (label, of, kind = "") => ({ label, kind, set: (cell, row) => say(cell, of(row)) });

// A bar of parts that follow each other: [[class, share], ...]
export function bar(cell, parts, label) {
  let box = cell.querySelector(":scope > .meter");
  if (!box) {
    box = make("span", { class: "meter", "aria-hidden": "true" });
    cell.replaceChildren(make("span"), box);
  }
  say(cell.firstChild, label);
  while (box.children.length > parts.length) box.lastChild.remove();
  parts.forEach(([kind, part], i) => {
    const piece = box.children[i] ?? box.appendChild(make("i"));
    if (piece.className !== kind) piece.className = kind;
    piece.style.width = `${100 * Math.max(0, Math.min(1, part || 0))}%`;
  });
}

export class Spark {
  // lines: how many values a point has; the last one is drawn first, faintly
  constructor(lines, { floor = 0, ceiling = null } = {}) {
    this.floor = floor;
    this.ceiling = ceiling;
    this.svg = document.createElementNS(SVG, "svg");
    for (const [name, value] of Object.entries({ viewBox: "0 0 150 30", preserveAspectRatio: "none", "aria-hidden": "true", class: "spark" })) {
      this.svg.setAttribute(name, value);
    }
    this.paths = Array.from({ length: lines }, (_, i) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", i ? "second" : "first");
      this.svg.prepend(path);
      return path;
    });
  }

  draw(points, least = 30) {
    const span = Math.max(least, points.length), known = points.flat().filter((v) => v != null);
    const top = this.ceiling ?? Math.max(...known, 1e-9) * 1.08;
    const y = (v) => (29 - 28 * Math.min(1, (v - this.floor) / (top - this.floor))).toFixed(1);
    this.paths.forEach((path, line) => {
      let d = "", open = false;
      points.forEach((values, i) => {
        const v = values[line];
        if (v != null) d += `${open ? "L" : "M"}${((150 * (span - points.length + i + 1)) / span).toFixed(1)} ${y(v)}${open ? "" : "h0.01"}`;
        open = v != null;
      });
      path.setAttribute("d", d);
    });
  }
}
