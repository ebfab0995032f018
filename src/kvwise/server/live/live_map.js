// The map of a pool: a canvas of thousands of blocks, told apart by colour, lightness and pattern; walked by keys.
import { count, make, say } from "./live_parts.js";

export const KINDS = [
  ["free", "holds nothing"],
  ["cached", "held by nobody; found by a prompt that begins alike, evicted when room is needed"],
  ["expiring", "cached, and its time to live ends within a minute"],
  ["pinned", "cached, and not evicted"],
  ["running", "held by one request"],
  ["shared", "held by several requests"],
  ["pages", "split into pages of single layers and heads"],
  ["packed", "split into pages of codes"],
];
const HEIGHT = 330, MOST = 15, LEAST = 2, PATTERNED = 6;

// Runs such as `a120bf3`: a letter for the kind and how many; `.` leaves blocks as they were.
export function decode(runs, held) {
  let at = 0;
  for (const [, letter, number] of runs.matchAll(/([a-h.])(\d*)/g)) {
    const length = number === "" ? 1 : +number;
    if (letter !== ".") held.fill(letter.charCodeAt(0) - 97, at, at + length);
    at += length;
  }
}

export function tally(held) {
  const counts = new Array(KINDS.length).fill(0);
  for (const kind of held) counts[kind]++;
  return counts;
}

// One block of a kind, as a canvas of `size` CSS pixels.
export function tile(kind, size) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--b-${name}`).trim();
  const scale = devicePixelRatio || 1, canvas = make("canvas");
  canvas.width = canvas.height = Math.max(1, Math.round(size * scale));
  const pen = canvas.getContext("2d"), gap = size >= 4 ? 1 : 0, side = size - gap, [name] = KINDS[kind];
  pen.scale(canvas.width / size, canvas.height / size);
  pen.fillStyle = colour(name);
  pen.fillRect(0, 0, side, side);
  if (size < PATTERNED) return canvas;
  pen.fillStyle = pen.strokeStyle = colour(`${name}-mark`) || "transparent";
  pen.lineWidth = Math.max(1, side / 6);
  const half = side / 2, line = (...points) => {
    pen.beginPath();
    points.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.stroke();
  };
  if (name === "expiring") line([0, side], [side, 0]);
  if (name === "pinned") { pen.beginPath(); pen.arc(half, half, side / 4.2, 0, 7); pen.fill(); }
  if (name === "shared") line([half, 0], [half, side]);
  if (name === "pages") { line([half, 0], [half, side]); line([0, half], [side, half]); }
  if (name === "packed") { pen.fillRect(0, 0, half, half); pen.fillRect(half, half, half, half); }
  return canvas;
}

export class BlockMap {
  // ask(strategy, block): a promise of the words that say which requests hold it
  constructor(strategy, readout, ask) {
    this.ask = ask;
    this.strategy = strategy;
    this.readout = readout;
    this.held = new Uint8Array(0);
    this.focus = 0;
    this.canvas = make("canvas", { tabindex: "0", role: "slider", "aria-label": `Blocks of ${strategy}`, "aria-valuemin": "0", "aria-describedby": "legend" });
    this.cursor = make("span", { class: "cursor", hidden: true });
    this.title = make("h3", { class: "code" }, strategy);
    this.box = make("div", { class: "map" }, this.canvas, this.cursor);
    this.node = make("figure", { "aria-label": strategy }, this.title, this.box);
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    this.canvas.addEventListener("focus", () => this.point(this.focus));
    this.canvas.addEventListener("blur", () => { this.cursor.hidden = true; });
    this.canvas.addEventListener("pointermove", (event) => this.onPointer(event));
    this.canvas.addEventListener("pointerdown", (event) => this.onPointer(event));
    this.canvas.addEventListener("pointerleave", () => {
      if (document.activeElement === this.canvas) this.point(this.focus);
      else this.cursor.hidden = true;
    });
    new ResizeObserver(() => this.layout()).observe(this.box);
  }

  set(number, runs) {
    const before = this.held, fresh = !runs.includes(".") && before.length !== number;
    this.held = before.length === number ? before.slice() : new Uint8Array(number);
    decode(runs, this.held);
    if (fresh) this.layout();
    else this.held.forEach((kind, i) => { if (kind !== before[i]) this.paint(i); });
    this.canvas.setAttribute("aria-valuemax", Math.max(0, number - 1));
    if (!this.cursor.hidden && before[this.pointed] !== this.held[this.pointed]) this.point(this.pointed);
  }

  layout() {
    const width = this.box.clientWidth, number = this.held.length;
    if (!width || !number) return;
    const fit = Math.floor(Math.sqrt((width * HEIGHT) / number));
    this.size = Math.max(LEAST, Math.min(MOST, fit));
    this.columns = Math.floor(width / this.size);
    const rows = Math.ceil(number / this.columns), scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.columns * this.size * scale);
    this.canvas.height = Math.round(rows * this.size * scale);
    this.canvas.style.width = `${this.columns * this.size}px`;
    this.canvas.style.height = `${rows * this.size}px`;
    this.repaint();
  }

  repaint() {
    if (!this.columns) return;
    this.tiles = KINDS.map((_, kind) => tile(kind, this.size));
    this.pen = this.canvas.getContext("2d");
    this.pen.setTransform(1, 0, 0, 1, 0, 0);
    this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const scale = this.canvas.width / (this.columns * this.size);
    this.pen.scale(scale, scale);
    for (let i = 0; i < this.held.length; i++) this.paint(i);
  }

  paint(i) {
    if (!this.pen) return;
    const x = (i % this.columns) * this.size, y = Math.floor(i / this.columns) * this.size;
    this.pen.clearRect(x, y, this.size, this.size);
    this.pen.drawImage(this.tiles[this.held[i]], x, y, this.size, this.size);
  }

  onPointer(event) {
    const column = Math.floor(event.offsetX / this.size), row = Math.floor(event.offsetY / this.size);
    const i = row * this.columns + column;
    if (column < this.columns && i >= 0 && i < this.held.length) {
      if (event.type === "pointerdown") this.focus = i;
      this.point(i);
    }
  }

  onKey(event) {
    const last = this.held.length - 1, [first, end] = this.run(this.focus);
    const steps = {
      ArrowLeft: this.focus - 1, ArrowRight: this.focus + 1, ArrowUp: this.focus - this.columns, ArrowDown: this.focus + this.columns,
      Home: 0, End: last, PageUp: first - 1, PageDown: end + 1,
    };
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.focus = Math.max(0, Math.min(last, steps[event.key]));
    this.point(this.focus);
  }

  run(i) {
    let first = i, end = i;
    while (first > 0 && this.held[first - 1] === this.held[i]) first--;
    while (end < this.held.length - 1 && this.held[end + 1] === this.held[i]) end++;
    return [first, end];
  }

  point(i) {
    if (!this.held.length) return;
    this.pointed = i;
    const [name, means] = KINDS[this.held[i]], [first, end] = this.run(i), alike = end - first + 1;
    const run = alike > 1 ? ` One of ${count(alike)} in a row.` : "";
    say(this.readout, `Block ${count(i)}: ${name}, ${means}.${run}`);
    this.canvas.setAttribute("aria-valuenow", i);
    this.canvas.setAttribute("aria-valuetext", `Block ${i}: ${name}.${run}`);
    clearTimeout(this.asking);
    if (["running", "shared"].includes(name)) this.asking = setTimeout(() => this.tellHolders(i), 200);
    const x = (i % this.columns) * this.size, y = Math.floor(i / this.columns) * this.size, side = Math.max(this.size, 6);
    this.cursor.style.transform = `translate(${x - 1.5}px, ${y - 1.5}px)`;
    this.cursor.style.width = this.cursor.style.height = `${side + 2}px`;
    this.cursor.hidden = false;
  }

  async tellHolders(i) {
    const told = this.readout.textContent, words = await this.ask(this.strategy, i);
    if (words && this.pointed === i && this.readout.textContent === told) {
      say(this.readout, `${told} ${words}`);
      this.canvas.setAttribute("aria-valuetext", `${this.canvas.getAttribute("aria-valuetext")} ${words}`);
    }
  }
}
